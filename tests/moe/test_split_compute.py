"""Experts computed in device slots and in host memory in one layer: dtypes, bits, and the CPU's kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import ROOT
from helpers.split_experts import difference, logits_of
from moeflow import load_moe
from moeflow.hf import experts_interface
from moeflow.kernels.cpu.library import instruction_set
from moeflow.moe.choose_compute import choose_compute
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.split_compute import SplitCompute
from moeflow.moe.torch_compute import TorchCompute
from moeflow.offload.streams import HostStreams
from moeflow.offload.trusting.downloads import Downloads

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="needs the compiled kernels")

NEARLY = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "host"), [("cpu", "cpu"), ("cpu", "torch"), ("torch", "cpu")])
def test_both_places_give_nearly_the_same_logits_and_the_same_bits_by_the_same_kernels(
    mixtral_folder, dtype, device, host
):
    """Outputs of one kind are float32 and of the other bfloat16, either way."""
    whole, none = logits_of(mixtral_folder, dtype, device, None, [0])
    split, on_host = logits_of(mixtral_folder, dtype, device, host, [1, 3, 0, 2])
    assert none == 0
    assert on_host > 5
    if device == host:
        assert torch.equal(split, whole)
    else:
        assert 0 < difference(split, whole) < NEARLY[dtype]


@pytest.mark.slow
def test_tritons_kernels_take_outputs_of_the_cpu_in_bfloat16(mixtral_folder):
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "helpers.split_experts", str(mixtral_folder), "bfloat16"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["on_host"] > 2
    assert said["difference"] < NEARLY[torch.bfloat16]


def test_the_cpus_compiled_kernels_run_what_lies_in_host_memory_and_only_where_that_is_asked_for(mixtral_records):
    (module, records), downloads = mixtral_records, Downloads(HostStreams(), is_pinned=False)
    for dtype in (torch.float32, torch.bfloat16):
        chosen = choose_compute(module, records, torch.device("cuda", 0), dtype, downloads=downloads)
        assert isinstance(chosen, SplitCompute)
        assert isinstance(chosen._host, CpuCompute)
        assert not isinstance(choose_compute(module, records, torch.device("cuda", 0), dtype), SplitCompute)
    unknown = choose_compute(module, records, torch.device("cuda", 0), torch.float64, downloads=downloads)
    assert isinstance(unknown, TorchCompute)


@pytest.fixture
def mixtral_records(mixtral_folder):
    with (model := load_moe(mixtral_folder, device="cpu", predictor=None)).moeflow:
        yield experts_interface.experts_modules(model)[0][1], model.moeflow.records(0)
