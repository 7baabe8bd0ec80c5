"""Runs experts on the CPU by the compiled kernels, straight from their records."""

import torch

from moeflow.core import RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.layer import LayerKernel
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel
from moeflow.moe.compute import run_apart
from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident


class CpuCompute:
    """The compiled kernels, straight from the records.

    Args:
        activation: of the module, between its matrices.
        is_transposed: whether float matrices are stored [in, out].
        activation_bits: width of activations that meet integer codes: 16 where they are rounded to a half precision
            anyway, 0 for float32.
    """

    def __init__(self, activation: Activation, is_transposed: bool, activation_bits: int) -> None:
        self._activation = activation
        self._is_transposed = is_transposed
        self._bits = activation_bits
        self._kernels: dict[int, ExpertKernel] = {}  # by the record's identity: equal records are one object

    def layer(self, records: list[RecordLayout]) -> LayerKernel:
        """Return the kernels of a layer whose records `can_run` was asked about."""
        return LayerKernel([self._kernels[id(record)] for record in records], self._bits)

    def can_run(self, records: list[RecordLayout]) -> bool:
        """Prepare a kernel for each record that `run` may meet; return whether all have one."""
        if instruction_set() is None:
            return False
        for record in records:
            if id(record) not in self._kernels:
                kernel = ExpertKernel.build(record, self._activation, is_transposed=self._is_transposed)
                if kernel is None:
                    return False
                self._kernels[id(record)] = kernel
        return True

    def path(self, call_tokens: int) -> int:
        return 0

    def allocate_outputs(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        shape = dispatch.num_places, hidden_states.shape[-1]
        return torch.empty(shape) if dispatch.is_whole else torch.zeros(shape)

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        starts: list[int] = [0]
        places: list[int] = []
        for resident in residents:
            places += dispatch.places(resident.expert)
            starts.append(len(places))
        cpu.run_experts(
            hidden_states,
            [self._kernels[id(resident.record)] for resident in residents],
            [resident.address for resident in residents],
            starts,
            [place // dispatch.top_k for place in places],
            places,
            outputs,
            activation_bits=self._bits,
        )

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if len(residents) > cpu.MAX_TOKEN_EXPERTS:
            return run_apart(self, hidden_states, residents, dispatch, top_k_weights)
        ordered = sorted(residents, key=lambda resident: dispatch.places(resident.expert))
        return cpu.run_token(
            hidden_states.contiguous(),
            [self._kernels[id(resident.record)] for resident in ordered],
            [resident.address for resident in ordered],
            _known(top_k_weights).contiguous(),
            activation_bits=self._bits,
        )

    def combine(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return cpu.combine(outputs, _known(top_k_weights), hidden_states.dtype)


def _known(top_k_weights: torch.Tensor) -> torch.Tensor:
    """Return router weights in a dtype that the kernels know: a router may compute in float64."""
    return top_k_weights if top_k_weights.dtype in DTYPES else top_k_weights.float()
