"""The benchmark of the lossless format runs through on a small model, and says what it measured."""

import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bench.best_hit_rate import best_hit_rate
from bench.cgroup import CgroupUnavailable, MemoryCgroup
from bench.lossless_capped import measure_capped
from bench.lossless_decode import WrongBits
from bench.rounds import quiet_ratio, quotients
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow.convert.pack import pack_model
from moeflow.kernels.cpu.library import instruction_set
from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.writer import TraceWriter

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="moeflow was installed without a C++ compiler")


def small_model(folder, scale=1):
    """Write a Mixtral and a tokenizer of one word; the logits are scaled."""
    model = tiny_mixtral(intermediate_size=128).bfloat16()
    model.lm_head.weight.data *= scale
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model") / "model")


def capped(**options):
    """The arguments of a short run under a cap."""
    return Namespace(**{"cap": "1000MB", "threads": "1", "rounds": 1, "tokens": 6} | options)


def needs_cgroups():
    try:
        MemoryCgroup.create(64_000_000).remove()
    except CgroupUnavailable as error:
        pytest.skip(f"no memory cgroup here: {error}")


@pytest.mark.slow
def test_last_line_is_one_json_object_with_every_part(model, tmp_path):
    options = {"threads": 1, "rounds": 1, "tokens": 8, "working-set-mb": 1, "budget": 0.5, "shape": "96x64"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_lossless.py"), "--model", str(model)]
    command += [f"--{name}={value}" for name, value in {**options, "work": tmp_path}.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bytes"]["differing"] == 0
    assert 0.7 < result["bytes"]["share"] < 0.9
    assert [row["format"] for row in result["gemv"]] == ["bfloat16", "lossless"] * 2
    for part in ("resident", "budget"):
        sizes = {name: row["all_experts_bytes"] for name, row in result[part].items()}
        assert sizes["lossless"] < 0.9 * sizes["bfloat16"]
        for row in result[part].values():
            assert row["step"] == "native"
            assert row["step_s"]["median"] > 0
            assert row["step_ratio_to_bfloat16"]["n"] == 1
    budget = result["budget"]
    assert budget["lossless"]["slots"] > budget["bfloat16"]["slots"]
    assert budget["lossless"]["best_hit_rate"] >= budget["bfloat16"]["best_hit_rate"]
    for row in budget.values():
        assert row["hit_rate"] <= row["best_hit_rate"] <= 1
    if "missing" not in result["capped"]:
        for row in result["capped"].values():
            assert row["token_s"]["n"] == 1
            assert row["cgroup_peak_bytes"]["max"] <= 1_000_000_000
            assert row["slots"]["min"] > 0
            assert len(row["rounds"]["token_s"]) == 1
    assert not list(tmp_path.iterdir()), "packed files stayed"


@pytest.mark.slow
def test_other_bits_under_the_cap_are_told(model, tmp_path):
    needs_cgroups()
    pack_model(model, tmp_path / "bfloat16")
    pack_model(small_model(tmp_path / "other", scale=2), tmp_path / "lossless", lossless=True)
    with pytest.raises(WrongBits, match="1000MB"):
        measure_capped(model, tmp_path, capped())


def test_a_process_that_the_cap_kills_is_an_error_by_name(model, tmp_path, capsys):
    needs_cgroups()
    found = measure_capped(model, tmp_path, capped(cap="64MB"))
    assert found == {"error": "bfloat16: killed at the cap"}
    assert "bfloat16: killed at the cap" in capsys.readouterr().out


def test_without_cgroups_the_cap_is_left_out(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.cgroup.CGROUP_ROOT", tmp_path)
    assert set(measure_capped(model, tmp_path / "work", capped())) == {"missing"}
    assert "no memory cgroup can be made here" in capsys.readouterr().out


def write_routes(path, prompt, decode):
    """Write a generation of one layer with 4 experts, one a token: expert numbers of prompt and decode."""
    format = TraceFormat((4,), 1, "model")
    with TraceWriter(path, format) as writer:
        rows = writer.new_rows(len(prompt) + len(decode))
        rows["experts"] = np.array([*prompt, *decode])[:, None, None]
        rows["phase"] = [PREFILL] * len(prompt) + [DECODE] * len(decode)
        writer.write(rows)
    return path


def test_best_hit_rate_counts_decode_steps_alone_and_knows_what_comes(tmp_path):
    path = write_routes(tmp_path / "cycle", [0, 0, 1], [2, 0, 1, 2, 0, 1])
    # two slots: the prompt brings 0 and 1; 2 takes the slot of 1, 0 hits, 1 takes that of 0, 2 hits, 0 takes that of 2
    # and stays, as 1 does: the next prompt finds both.
    assert best_hit_rate(path, 2, rounds=3) == 3 / 6
    assert best_hit_rate(path, 2, rounds=3, policy="lru") == 0
    assert best_hit_rate(path, 3, rounds=3) == 1


def test_quiet_ratio_leaves_out_rounds_in_which_others_ran():
    assert quiet_ratio([4.0, 90.0, 3.0], [2.0, 1.0, 2.0], [0.05, 0.6, 0.1]) == quotients([4.0, 3.0], [2.0, 2.0])
    assert quiet_ratio([4.0], [2.0], [0.2]) is None
