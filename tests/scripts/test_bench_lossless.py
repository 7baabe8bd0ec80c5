"""The benchmark of the lossless format runs through on a small model, and says what it measured."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="moeflow was installed without a C++ compiler")


@pytest.mark.slow
def test_last_line_is_one_json_object_with_every_part(tmp_path):
    tiny_mixtral(intermediate_size=128).bfloat16().save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    options = {"threads": 1, "rounds": 1, "tokens": 8, "working-set-mb": 1, "budget": 0.5, "shape": "96x64"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_lossless.py"), "--model", str(tmp_path / "model")]
    command += [f"--{name}={value}" for name, value in {**options, "work": tmp_path}.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bytes"]["differing"] == 0
    assert 0.7 < result["bytes"]["share"] < 0.9
    assert [row["format"] for row in result["gemv"]] == ["bfloat16", "lossless"] * 2
    for part in ("resident", "budget"):
        sizes = {name: row["all_experts_bytes"] for name, row in result[part].items()}
        assert sizes["lossless"] < 0.9 * sizes["bfloat16"]
    assert result["budget"]["lossless"]["slots"] > result["budget"]["bfloat16"]["slots"]
