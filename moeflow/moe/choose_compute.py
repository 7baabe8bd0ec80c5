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


def tell_of_slow_lossless(device: torch.device) -> None:
    """Warn where no kernel computes lossless experts from their codes, so that torch unpacks them at every use."""
    if device.type == "cpu" and instruction_set() is None:
        remedy = "Install moeflow where there is a C++ compiler"
    elif device.type != "cpu" and not available():
        remedy = "Install Triton"
    else:
        return
    _log.warning(
        "lossless experts are unpacked by torch at every use, many times slower than they are computed from their "
        "codes: no kernel for them runs here. %s, or store the experts in bfloat16: moeflow pack MODEL OUT "
        "--no-lossless.",
        remedy,
    )
