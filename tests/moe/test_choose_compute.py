"""Which kernels run a layer's experts: each kind, in a process of its own, gives the model's own logits."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.gguf_models import write_model
from helpers.lossless_models import spoilt
from helpers.small_gguf import small_model
from helpers.small_models import tiny_mixtral
from moeflow.convert.pack import pack_model
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.cpu.library import instruction_set
from moeflow.moe.choose_compute import tell_slow_blocks

_LOGITS = """
import json, sys
import torch
from moeflow import load_moe
from moeflow.moe.triton_compute import TritonCompute
from moeflow.kernels.activations import recognise

torch.set_num_threads(1)
wanted, folder, quantization = sys.argv[1:4]
found = []
for budget in ("100%", "25%"):
    model = load_moe(folder, expert_memory=budget, quantization=quantization or None, dtype=torch.float32)
    for layer in model.model.layers if wanted == "triton" else ():
        module = layer.mlp.experts
        compute = TritonCompute(recognise(module._apply_gate, True), module.is_transposed)
        assert compute.can_run(model.moeflow.records(module._moeflow.layer))
        module._moeflow._computes[torch.float32] = compute
    with torch.no_grad():
        output = model(torch.arange(1, 19).unsqueeze(0))
        logits = [output.logits]
        for token in (3, 5):
            logits.append(model(torch.tensor([[token]]), past_key_values=output.past_key_values).logits)
    found.append(torch.cat(logits, 1))
    experts = [layer.mlp.experts._moeflow for layer in model.model.layers]
    kinds = {type(kind).__name__ for one in experts for kind in one._computes.values()}
    model.moeflow.close()
assert torch.equal(*found), "bits depend on the budget"
print(json.dumps({"kinds": sorted(kinds), "logits": found[0].flatten().tolist()}))
"""


def logits(wanted, folder, quantization="", **variables):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOGITS, wanted, str(folder), quantization],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    return said["kinds"], torch.tensor(said["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["", "int4"])
def test_every_kind_of_compute_gives_the_same_logits_at_every_budget(mixtral_folder, quantization):
    kinds, expected = logits("torch", mixtral_folder, quantization, MOEFLOW_CPU_KERNELS="off")
    assert kinds == ["TorchCompute"]
    if instruction_set() is not None:
        kinds, found = logits("cpu", mixtral_folder, quantization)
        assert kinds == ["CpuCompute"]
        assert (found - expected).norm() < 1e-5 * expected.norm()
    pytest.importorskip("triton")
    kinds, found = logits("triton", mixtral_folder, quantization, TRITON_INTERPRET="1")
    assert kinds == ["TritonCompute"]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_a_path_that_does_not_exist_is_refused(mixtral_folder):
    with pytest.raises(AssertionError, match="no instruction set"):
        logits("cpu", mixtral_folder, MOEFLOW_CPU_KERNELS="sse9")


@pytest.fixture(scope="module")
def lossless_folder(tmp_path_factory):
    """One layer packed without loss: experts with escapes and without, and one that stays bfloat16."""
    below = tmp_path_factory.mktemp("lossless")
    model = tiny_mixtral(intermediate_size=128, num_hidden_layers=1, num_local_experts=16).bfloat16()
    spoilt(model, 0, 1, 0.002)
    spoilt(model, 0, 2, 0.2)
    model.save_pretrained(below / "source")
    return pack_model(below / "source", below / "packed", lossless=True).folder


@pytest.mark.slow
def test_tritons_kernels_give_the_bits_of_bfloat16_from_lossless_experts(lossless_folder):
    pytest.importorskip("triton")
    (_, expected), (kinds, found) = (
        logits("triton", folder, TRITON_INTERPRET="1")
        for folder in (lossless_folder.parent / "source", lossless_folder)
    )
    assert kinds == ["TritonCompute"]
    assert torch.equal(found, expected)


def small_types(name, shape):
    """Return Q4_K for gate and up, Q8_0 for down: two kinds of blocks in an expert."""
    return "F32" if len(shape) == 1 or "_exps" not in name else "Q4_K" if shape[-1] == 256 else "Q8_0"


@pytest.mark.slow
def test_tritons_kernels_compute_experts_from_the_blocks_of_a_gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    sizes = {"moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 12}  # the interpreter is slow
    model = write_model(tmp_path / "small.gguf", "qwen3moe", small_model(**sizes), small_types)
    kinds, found = logits("triton", tmp_path / "small.gguf", TRITON_INTERPRET="1")
    assert kinds == ["TritonCompute"]
    with torch.no_grad():
        output = model(torch.arange(1, 19).unsqueeze(0))
        steps = [model(torch.tensor([[token]]), past_key_values=output.past_key_values).logits for token in (3, 5)]
    expected = torch.cat([output.logits, *steps], 1).flatten()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_without_a_kernel_are_told_of_by_their_types(caplog, device):
    matrices = [MatrixSpec("down_proj", name, (1, 256)) for name in ("q4_k", "iq2_xs", "tq1_0", "ggml_mxfp4", "int8")]
    records = [RecordLayout((), 0, (matrix,)) for matrix in matrices]
    tell_slow_blocks(records, torch.device(device))
    assert f"no kernel computes experts in iq2_xs, tq1_0 on {device}:" in caplog.text
    caplog.clear()
    tell_slow_blocks(records[:1], torch.device(device))
    assert not caplog.text


_LOADED = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
from moeflow import load_moe
from moeflow.checkpoint.lossless_source import any_lossless
source, packed = sys.argv[1:]
for folder, quantization in ((source, None), (packed, None), (source, "lossless"), (packed, "lossless")):
    print("loading", file=sys.stderr)
    with load_moe(folder, device="cpu", predictor=None, quantization=quantization).moeflow as runtime:
        print(any_lossless(runtime.store.layers))
"""


@pytest.mark.slow
def test_without_the_compiled_kernels_lossless_experts_become_bfloat16_as_they_are_read_and_it_is_said(lossless_folder):
    command = [sys.executable, "-W", "ignore", "-c", _LOADED, str(lossless_folder.parent / "source"), lossless_folder]
    environment = {**os.environ, "MOEFLOW_CPU_KERNELS": "off"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    warnings = [text.count("decoded as they are read") for text in run.stderr.split("loading\n")[1:]]
    assert warnings == [0, 1, 1, 1]
    assert run.stdout.split() == ["False"] * 4
