"""The decode benchmark and its GGUF export, on a tiny random Mixtral."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

from bench.cgroup import CgroupUnavailable, MemoryCgroup, drop_page_cache, run_process
from bench.gguf_export import ExportError, export_gguf, read_tensor
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow.checkpoint.headers import open_checkpoint

NUM_LAYERS, NUM_EXPERTS, NUM_HEADS, NUM_KEY_VALUE_HEADS = 3, 8, 4, 2


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


def test_gguf_holds_the_checkpoints_values(folder, tmp_path):
    source = open_checkpoint(folder)
    path = export_gguf(folder, tmp_path)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 3 + NUM_LAYERS * 10

    def check(name, source_name, values):
        expected = read_tensor(source, source_name)
        assert values.shape == expected.shape
        assert values.tolist() == expected.astype(values.dtype).tolist(), name

    def undo_rope(rows, num_heads):
        pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])  # [heads, head_dim / 2, 2, hidden]
        return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows.shape)

    for layer in range(NUM_LAYERS):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for name, num_heads in (("q", NUM_HEADS), ("k", NUM_KEY_VALUE_HEADS)):
            check(
                name,
                f"{theirs}self_attn.{name}_proj.weight",
                undo_rope(tensors[f"{ours}attn_{name}.weight"], num_heads),
            )
        check("v", f"{theirs}self_attn.v_proj.weight", tensors[f"{ours}attn_v.weight"])
        check("o", f"{theirs}self_attn.o_proj.weight", tensors[f"{ours}attn_output.weight"])
        check("norm", f"{theirs}input_layernorm.weight", tensors[f"{ours}attn_norm.weight"])
        check("norm", f"{theirs}post_attention_layernorm.weight", tensors[f"{ours}ffn_norm.weight"])
        gate = next(name for name in source.tensors if name.startswith(theirs) and name.endswith(".gate.weight"))
        check("router", gate, tensors[f"{ours}ffn_gate_inp.weight"])
        assert tensors[f"{ours}ffn_gate_inp.weight"].dtype == tensors[f"{ours}attn_norm.weight"].dtype == np.float32
        for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            stack = tensors[f"{ours}ffn_{name}_exps.weight"]
            assert stack.dtype == np.float16
            for expert in range(NUM_EXPERTS):
                check(name, f"{theirs}block_sparse_moe.experts.{expert}.{w}.weight", stack[expert])
    check("embedding", "model.embed_tokens.weight", tensors["token_embd.weight"])
    check("norm", "model.norm.weight", tensors["output_norm.weight"])
    check("head", "lm_head.weight", tensors["output.weight"])
    assert reader.fields["llama.expert_count"].contents() == NUM_EXPERTS
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["h e"]


def test_gguf_is_made_once_and_leaves_no_partial_file(folder, tmp_path):
    path = export_gguf(folder, tmp_path)
    made = path.stat().st_mtime_ns
    assert export_gguf(folder, tmp_path) == path
    assert path.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [path]


def test_another_architecture_is_refused_by_name(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    (other / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(ExportError, match="olmoe"):
        export_gguf(other, tmp_path)


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
