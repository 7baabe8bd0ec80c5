"""Bits of exponents, counted by the benchmark, are those of codes that are written out."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from bench_exponent_codes import Counts, Huffman
from helpers.paths import ROOT
from moeflow.kernels.quantization.lossless import encode_lossless

WAYS = ("apart", "in order")


def _counts(rows, exponent_bits=8):
    counts = Counts(exponent_bits, 7)
    counts.add(np.array(rows, np.uint8))
    return counts.bits()


def test_four_bits_with_escapes_apart_are_the_format():
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3, 7], weight[5, 5] = 1e-30, 0.0  # an escape, and none
    exponents = (weight.view(torch.int16).numpy().view("uint16") >> 7 & 255).astype("uint8")
    stored = 8 * sum(part.nbytes for part in encode_lossless(weight))
    assert 8 + _counts(exponents)["4 bits, escapes apart"] == pytest.approx(stored / weight.numel())


def test_three_bits_reach_seven_exponents_and_the_rest_escapes():
    row = [*range(100, 107)] * 9 + [90]  # 64 values, one of them out of reach
    found = _counts([row, row])
    assert [found[f"3 bits, escapes {way}"] for way in WAYS] == [3 + (16 + 40) / 64, 3 + (16 + 8) / 64]
    assert found["two levels, 3 and 4 bits"] == 3 + (16 + 4) / 64
    assert found["two levels, 2 and 4 bits"] == 2 + (16 + 4 * (64 - 27)) / 64


def test_entropy_of_four_exponents_that_are_as_frequent_is_two_bits():
    rows = [[20, 21, 22, 23] * 4, [24, 25, 26, 27] * 4]
    found = _counts(rows, 5)
    assert found["entropy, a table a matrix"] == 3
    assert found["entropy, a table a row (the tables not counted)"] == 2
    assert found["entropy below a row's top, a table a matrix"] == 2 + 16 / 16


def test_a_huffman_code_is_never_shorter_than_the_entropy():
    exponents = np.random.default_rng(0).binomial(40, 0.5, (64, 256)).astype(np.uint8)
    huffman = Huffman()
    huffman.add(exponents)
    ideal = _counts(exponents)["entropy, a table a matrix"]
    assert ideal <= huffman.bits < ideal + 0.2


@pytest.mark.slow
def test_a_model_that_is_not_there_is_an_error(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench_exponent_codes.py"), "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is not a folder" in done.stderr
