"""Every entry of the compiled libraries refuses what it cannot compute with: an exception, never a signal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.cpu_experts import Expert, needs_library
from helpers.paths import ROOT
from moeflow.errors import ConfigError
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.structs import ExpertKernel

FUZZ = Path(__file__).parents[1] / "helpers" / "native_entries_fuzz.py"
NUM_CALLS = 7500


@needs_library
@pytest.mark.slow
def test_wrong_arguments_are_refused_and_right_ones_computed():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    ended = subprocess.run(
        [sys.executable, str(FUZZ), str(NUM_CALLS), "0"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert ended.returncode == 0, (ended.returncode, ended.stdout[-500:], ended.stderr[-2000:])
    counts = {name: (int(no), int(yes)) for name, no, yes in (entry.split(":") for entry in ended.stdout.split())}
    print(f"{NUM_CALLS} calls, 0 signals:", counts)
    assert sum(map(sum, counts.values())) == NUM_CALLS
    assert all(no > 10 and yes > 10 for no, yes in counts.values()), counts


@pytest.fixture
def expert():
    return Expert(0, "float32", (64, 32))


@needs_library
@pytest.mark.parametrize("number", [0, 65])
def test_a_token_has_1_to_64_experts(expert, number):
    with pytest.raises(ConfigError, match=rf"{number} experts of one token \(1 to 64\)"):
        cpu.run_token(torch.ones(1, 64), [expert.kernel] * number, [expert.address] * number, torch.ones(1, number))


@needs_library
def test_no_experts_sum_to_zeros():
    assert cpu.combine(torch.empty(0, 64), torch.ones(3, 0), torch.bfloat16).eq(0).all()


@needs_library
@pytest.mark.parametrize(("tokens", "places"), [([1], [0]), ([-1], [0]), ([0], [1]), ([0], [-1])])
def test_a_row_or_place_that_is_not_there_is_refused(expert, tokens, places):
    with pytest.raises(ConfigError, match="out of range"):
        cpu.run_experts(
            torch.ones(1, 64), [expert.kernel], [expert.address], [0, 1], tokens, places, torch.empty(1, 64)
        )


@needs_library
def test_experts_of_other_sizes_are_refused(expert):
    other = Expert(0, "float32", (64, 31))
    for kernels in ([expert.kernel, other.kernel], [Expert(0, "float32", (65, 32)).kernel] * 2):
        with pytest.raises(ConfigError, match="experts differ in size"):
            cpu.run_token(torch.ones(1, 64), kernels, [expert.address] * 2, torch.ones(1, 2))


@needs_library
def test_the_error_says_what_was_found():
    with pytest.raises(ConfigError, match=r"float64 \[1, 64\] on meta; float32 \[1, 2\] on cpu, not contiguous"):
        cpu.run_token(torch.ones(1, 64, dtype=torch.float64, device="meta"), [], [], torch.ones(1, 4)[:, ::2])


@pytest.mark.parametrize("form", ["float32", "int4-g32", "fp8"])
def test_a_record_that_lacks_bytes_of_a_matrix_has_no_kernel(form):
    whole = Expert(0, form, (64, 32), has_bias=True).record
    assert ExpertKernel.build(whole, Expert(0, form, (64, 32)).activation, is_transposed=False)
    for number in range(len(whole.tensors)):
        others = [*whole.tensors[:number], *whole.tensors[number + 1 :]]
        spec = whole.tensors[number]
        for changed in (
            spec._replace(offset=whole.num_bytes - 1),
            spec._replace(offset=-64),
            spec._replace(shape=(spec.shape[0] - 1, *spec.shape[1:])),
        ):
            record = whole._replace(tensors=(*others, changed))
            assert ExpertKernel.build(record, Expert(0, form, (64, 32)).activation, is_transposed=False) is None
