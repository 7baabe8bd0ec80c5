"""Chooses the kernels that run a layer's experts, once, from module, records and device."""

import logging
from collections.abc import Iterable
from functools import cache

import torch

from moeflow.core import RecordLayout
from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.kernels.activations import recognise
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.structs import DTYPES, block_number
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.triton.matrix import BLOCK_FORMATS
from moeflow.kernels.triton.probe import why_not
from moeflow.moe.compute import ExpertCompute
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.split_compute import SplitCompute
from moeflow.moe.torch_compute import TorchCompute
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.trusting.downloads import Downloads

_log = logging.getLogger(__name__)


def choose_compute(
    module: ExpertsModule,
    records: list[RecordLayout],
    device: torch.device,
    dtype: torch.dtype,
    *,
    downloads: Downloads | None = None,
) -> ExpertCompute:
    """Return the fastest kernels that can run a layer's experts.

    Args:
        module: the experts module.
        records: [num_experts], as the runtime hands them out.
        device: where the experts are computed.
        dtype: of the hidden states.
        downloads: the ways of tokens to host memory, where the CPU computes some of a GPU's experts; else None.
    """
    activation = None
    if not experts_interface.has_post_norm(module) and dtype in DTYPES:
        apply = experts_interface.activation_of(module)
        activation = recognise(apply, module.has_gate)
    if activation is None:
        return TorchCompute(module)
    cpu = CpuCompute(activation, module.is_transposed, 0 if dtype == torch.float32 else 16)
    plain = TorchCompute(module)
    if device.type == "cpu":
        return cpu if cpu.can_run(records) else plain
    triton = TritonCompute(activation, module.is_transposed)
    compute = triton if can_use_triton(device) and triton.can_run(records) else plain
    if downloads is not None:
        return SplitCompute(compute, cpu if cpu.can_run(records) else plain, downloads)
    return compute


@cache
def can_use_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; tells once why they do not."""
    reason = why_not(device)
    if reason is not None:
        _log.warning("Triton's kernels cannot run on %s: %s. PyTorch's own are used, which are slower.", device, reason)
    return reason is None


def computes_lossless(device: torch.device) -> bool:
    """Whether a device has kernels that compute lossless experts from their codes; said where it has none."""
    if device.type == "cpu":
        found, remedy = instruction_set() is not None, "install moeflow where there is a C++ compiler"
    else:
        found, remedy = can_use_triton(device), "let Triton run"
    if not found:
        _log.warning(
            "no kernel computes lossless experts from their codes here: they are decoded as they are read, slowly, and "
            "take the memory of bfloat16. To change that %s; moeflow pack MODEL OUT --no-lossless writes a folder that "
            "is read faster here.",
            remedy,
        )
    return found


def tell_slow_blocks(records: Iterable[RecordLayout], device: torch.device) -> None:
    """Say once which experts in GGML's blocks have no kernel on a device.

    Args:
        records: the distinct ones of a model.
        device: where experts are computed.
    """
    formats = {matrix.format for record in records for matrix in record.matrices}
    blocks = {name for name in formats if find_format(name).kind == "ggml"}
    known = BLOCK_FORMATS if device.type != "cpu" else [name for name in blocks if block_number(name) is not None]
    slow = blocks.difference(known)
    if slow:
        _log.warning(
            "no kernel computes experts in %s on %s: torch unpacks them for every use, which is slow. There are "
            "kernels for q4_k and q8_0.",
            ", ".join(sorted(slow)),
            device,
        )
