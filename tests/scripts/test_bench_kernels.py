"""The kernels' benchmark runs through, says what it measured, and lets no wrong result pass."""

import json
import subprocess
import sys

import pytest
import torch

from bench.matrices import WrongResult, check
from helpers.paths import ROOT
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import instruction_set

needs_library = pytest.mark.skipif(instruction_set() is None, reason="moeflow was installed without a C++ compiler")


@pytest.mark.slow
@needs_library
def test_last_line_is_one_json_object_with_every_part():
    command = [sys.executable, str(ROOT / "scripts" / "bench_kernels.py"), "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--formats", "bfloat16,int8,int4-g64,mxfp4,fp8"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"card", "gemv", "block", "gemm", "figures"}
    assert result["card"]["read_bytes_per_s"] > 0
    assert result["card"]["instruction_set"] == instruction_set()
    measured = {(row["format"], row["activations"]) for row in result["gemv"]}
    assert {("bfloat16", "exact"), ("int8", "torch int8 bfloat16"), ("int4-g64", "torch int4 bfloat16")} <= measured
    assert len([form for form, activations in measured if activations == "exact"]) == 5
    assert all(row["share_of_read"]["min"] <= row["share_of_read"]["median"] for row in result["gemv"])
    assert {row["tokens"] for row in result["block"]} == {1, 3, 32}
    assert {row["engine"] for row in result["block"]} >= {"eager", "grouped_mm", "moeflow bfloat16", "moeflow int4-g64"}
    assert {row["format"] for row in result["gemm"]} >= {"torch float32", "torch bfloat16", "bfloat16", "fp8"}
    assert all(row["share_of_peak"] > 0 for row in result["gemm"])


def test_wrong_result_is_refused_and_not_a_number_too():
    expected = torch.ones(4, dtype=torch.float64)
    assert check(torch.full((4,), 1.001), expected, 1e-2, "a product") == pytest.approx(1e-3, rel=1e-3)
    for wrong in (1.1, float("nan")):
        with pytest.raises(WrongResult, match=r"a product: .* the bound 1e-02"):
            check(torch.full((4,), wrong), expected, 1e-2, "a product")


@needs_library
def test_read_bandwidth_is_that_of_a_read_of_the_whole_block():
    block = torch.arange((1 << 20) // 8)
    assert cpu.read(block) == 0, "the words of a power of two of numbers cancel"
    block[5] ^= 7
    assert cpu.read(block) == 7
    assert cpu.read_bandwidth(1 << 20, repeats=1) > 0
