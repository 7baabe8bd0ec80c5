"""The decode benchmark and its GGUF file, on a tiny random Mixtral."""

import json
import subprocess
import sys

import pytest

from bench.cgroup import CgroupUnavailable, MemoryCgroup, drop_page_cache, run_process
from bench.gguf_file import gguf_of
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral

NUM_LAYERS, NUM_EXPERTS = 3, 8


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a byte-level tokenizer of the same vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bench") / "model"
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tiny_mixtral(vocab_size=264).save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_last_line_is_one_json_object_with_rows_and_ratios(folder, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench_decode.py"),
        "--model",
        str(folder),
        "--work",
        str(tmp_path),
    ]
    options = [
        "--tokens",
        "4",
        "--repeats",
        "1",
        "--rounds",
        "1",
        "--residencies",
        "50",
        "--only",
        "moeflow,transformers",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"transformers eager", "moeflow auto", "moeflow 100 %", "moeflow 50 %"}
    assert not [row["error"] for row in rows.values() if "error" in row]
    assert all(row["tokens_as_reference"] == 4 for row in rows.values())
    assert result["card"]["num_experts"] == NUM_LAYERS * NUM_EXPERTS
    assert result["card"]["expert_bytes"] == 3 * 64 * 96 * 4
    ratios = result["ratios"]
    assert ratios["resident: moeflow / transformers eager"]["ratio"] > 0
    assert ratios["read bandwidth / plain O_DIRECT"]["ratio"] > 0
    assert ratios["peak memory - (budget + dense)"]["worst_mb"] > 0
    assert "--cap" in ratios["capped: moeflow / llama.cpp"]["missing"]
    assert not list(tmp_path.iterdir()), "scratch files stayed"


def test_gguf_is_written_once_and_leaves_no_partial_file(folder, tmp_path):
    path = gguf_of(folder, tmp_path)
    made = path.stat().st_mtime_ns
    assert gguf_of(folder, tmp_path) == path
    assert path.stat().st_mtime_ns == made
    assert gguf_of(folder, tmp_path, "q8_0") != path
    assert not list(tmp_path.glob("*.partial"))


def test_a_process_over_its_limit_is_reported_and_the_cgroup_is_gone(tmp_path):
    try:
        cgroup = MemoryCgroup.create(64_000_000)
    except CgroupUnavailable as error:
        pytest.skip(f"no memory cgroup here: {error}")
    parent = cgroup.folder.parent
    cgroup.remove()
    fits = run_process([sys.executable, "-c", "x = bytearray(10_000_000)"], limit_bytes=64_000_000, timeout_s=30)
    assert fits.returncode == 0
    assert 10_000_000 < fits.peak_bytes <= 64_000_000
    large = run_process([sys.executable, "-c", "x = bytearray(200_000_000)"], limit_bytes=64_000_000, timeout_s=30)
    assert large.oom_killed
    assert not list(parent.glob("moeflow-bench-*"))


def test_page_cache_of_a_written_file_is_dropped(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 20))
    assert 0 <= drop_page_cache([file]) <= 1 << 20
