"""A model whose experts are computed in two places: some in device slots, others by the CPU in the host tier.

As a program it takes Triton's kernels as the device's, under the interpreter: `split_experts.py FOLDER DTYPE`.
"""

import json
import sys

import torch

from helpers.expert_runtimes import GivenSplit, ThreadStreams
from moeflow import load_moe
from moeflow.hf import experts_interface
from moeflow.kernels.activations import recognise
from moeflow.kernels.triton import matrix
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.experts import OffloadedExperts
from moeflow.moe.split_compute import SplitCompute
from moeflow.moe.torch_compute import TorchCompute
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.host_tier import HostTier
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import ExpertCache

CPU = torch.device("cpu")


def compute(kind, module, records, dtype):
    """Return a compute by its kind: "cpu", "torch" or "triton"."""
    activation = recognise(experts_interface.activation_of(module), module.has_gate)
    if kind == "torch":
        return TorchCompute(module)
    bits = 0 if dtype == torch.float32 else 16
    made = (
        TritonCompute(activation, module.is_transposed)
        if kind == "triton"
        else CpuCompute(activation, module.is_transposed, bits)
    )
    assert made.can_run(records)
    return made


def logits_of(folder, dtype, device, host, numbers, *, num_tokens=19):
    """Return logits of a prompt and of two steps after it, and how many experts the CPU computed.

    Args:
        device: kind of the device's compute; `host` of the CPU's, or None: all experts are copied.
        numbers: of experts that the CPU computes, one after the other.
    """
    model = load_moe(folder, device="cpu", predictor=None, dtype=dtype, step="python")
    store = model.moeflow.store
    num_bytes = store.layers[0].layout.record.num_bytes
    tier, split = HostTier(SlotPool(24, num_bytes, CPU), ExpertCache(24)), GivenSplit(*numbers)
    pool, cache = SlotPool(6, num_bytes, CPU), ExpertCache(6)
    with ExpertRuntime(store, pool, cache, ThreadStreams(), host=tier, misses=split if host else None) as runtime:
        for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):
            experts = module._moeflow = OffloadedExperts(runtime, layer, module)
            records = runtime.records(layer)
            made = compute(device, module, records, dtype)
            if host is not None:
                made = SplitCompute(made, compute(host, module, records, dtype), runtime.downloads)
            experts._computes[dtype] = made
        found = []
        with torch.no_grad():
            for _ in range(2):  # the first pass fills the host tier
                output = model(torch.arange(1, 1 + num_tokens).unsqueeze(0))
                found = [output.logits]
                for token in (3, 5):
                    step = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
                    found.append(step.logits)
        runtime.check_integrity()
        decisions = [phase["decisions"]["computed_on_host"] for phase in runtime.stats().values() if _is_phase(phase)]
    model.moeflow.close()
    return torch.cat(found, 1).float(), sum(decisions)


def larger_blocks():
    """Give each program of the interpreter more rows, for it is paid by the program."""
    for key, (_, blocks) in matrix._DECODE_BLOCKS.items():
        matrix._DECODE_BLOCKS[key] = (64, blocks)


def difference(found, expected):
    """Return the relative error at the middle position: at some the last bits send a token to other experts."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _is_phase(value):
    return isinstance(value, dict) and "decisions" in value


if __name__ == "__main__":
    folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    larger_blocks()
    whole, _ = logits_of(folder, dtype, "cpu", None, [0], num_tokens=2)
    split, on_host = logits_of(folder, dtype, "triton", "cpu", [1, 0, 2], num_tokens=2)
    print(json.dumps({"on_host": on_host, "difference": difference(split, whole)}))
