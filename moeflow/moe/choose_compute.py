"""Chooses the kernels that run a layer's experts, once, from module, records and device."""

import logging

import torch

from moeflow.core import RecordLayout
from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.kernels.activations import recognise
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.structs import DTYPES
from moeflow.kernels.triton.experts import available
from moeflow.moe.compute import ExpertCompute
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.torch_compute import TorchCompute
from moeflow.moe.triton_compute import TritonCompute

_log = logging.getLogger(__name__)


def choose_compute(
    module: ExpertsModule, records: list[RecordLayout], device: torch.device, dtype: torch.dtype
) -> ExpertCompute:
    """Return the fastest kernels that can run a layer's experts.

    Args:
        module: the experts module.
        records: [num_experts], as the runtime hands them out.
        device: where the experts are computed.
        dtype: of the hidden states.
    """
    activation = None
    if not experts_interface.has_post_norm(module) and dtype in DTYPES:
        apply = experts_interface.activation_of(module)
        activation = recognise(apply, module.has_gate)
    if activation is None:
        return TorchCompute(module)
    compute: CpuCompute | TritonCompute
    if device.type == "cpu":
        compute = CpuCompute(activation, module.is_transposed, 0 if dtype == torch.float32 else 16)
    else:
        compute = TritonCompute(module, activation)
    return compute if compute.can_run(records) else TorchCompute(module)


def computes_lossless(device: torch.device) -> bool:
    """Whether a device has kernels that compute lossless experts from their codes; said where it has none."""
    if device.type == "cpu":
        found, remedy = instruction_set() is not None, "install moeflow where there is a C++ compiler"
    else:
        found, remedy = available(), "install Triton"
    if not found:
        _log.warning(
            "no kernel computes lossless experts from their codes here: they are decoded as they are read, slowly, and "
            "take the memory of bfloat16. To change that %s; moeflow pack MODEL OUT --no-lossless writes a folder that "
            "is read faster here.",
            remedy,
        )
    return found
