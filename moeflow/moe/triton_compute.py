"""Runs experts on a GPU by Triton kernels, straight from the device's slots."""

from itertools import accumulate

import torch

from moeflow.core import RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.triton.experts import TritonExperts
from moeflow.kernels.triton.ops import prefill_tile
from moeflow.moe.compute import run_apart
from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident
from moeflow.offload.trusting.device_table import DeviceTable

MAX_PAIRED_TOKENS = 16
"""Up to so many tokens a pass the GPU multiplies pair by pair; beyond, each expert with all its tokens."""


class TritonCompute:
    """Triton's kernels, straight from the device's slots. Not yet measured on a GPU.

    Args:
        activation: of the module, between its matrices.
        is_transposed: whether float matrices are stored [in, out].
    """

    def __init__(self, activation: Activation, is_transposed: bool) -> None:
        self._activation = activation
        self._is_transposed = is_transposed
        self._kernels: dict[int, TritonExperts] = {}  # by the record's identity: equal records are one object
        self._of_all: TritonExperts | None = None  # where all records of the layer are equal

    def can_run(self, records: list[RecordLayout]) -> bool:
        """Prepare a kernel for each record that `run` may meet; return whether all have one."""
        for record in records:
            if id(record) not in self._kernels:
                kernel = TritonExperts.build(record, self._activation, is_transposed=self._is_transposed)
                if kernel is None:
                    return False
                self._kernels[id(record)] = kernel
        kernels = {self._kernels[id(record)] for record in records}
        self._of_all = kernels.pop() if len(kernels) == 1 else None
        return True

    def path(self, call_tokens: int) -> int:
        return 0 if call_tokens <= MAX_PAIRED_TOKENS else prefill_tile(call_tokens)

    def can_look_up(self, num_tokens: int) -> bool:
        """Whether `look_up` takes so many tokens."""
        return self._of_all is not None and num_tokens <= MAX_PAIRED_TOKENS

    def look_up(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        table: DeviceTable,
        layer: int,
    ) -> torch.Tensor:
        """Run a layer by kernels that find its experts themselves, with the bits of the other ways.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K].
            top_k_weights: [T, K].
            table: of the slots; its `missed` becomes 1 at the layer where an expert is absent.
            layer: number among the MoE layers.

        Returns:
            [T, H].
        """
        assert self._of_all is not None, "experts of several kinds"
        row, missed = table.row(layer), table.missed
        return self._of_all.lookup(hidden_states, table.arena, top_k_index, row, missed, layer, top_k_weights)

    def allocate_outputs(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return hidden_states.new_zeros(dispatch.num_places, hidden_states.shape[-1], dtype=torch.float32)

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        alike: dict[int, list[Resident]] = {}
        for resident in residents:
            alike.setdefault(id(resident.record), []).append(resident)
        for group in alike.values():
            self._run_alike(hidden_states, group, dispatch, outputs)

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if len({id(resident.record) for resident in residents}) > 1:
            return run_apart(self, hidden_states, residents, dispatch, top_k_weights)
        locations = [0] * dispatch.top_k
        for resident in residents:
            locations[dispatch.places(resident.expert)[0]] = resident.location
        on_device = torch.tensor([locations], dtype=torch.int32).to(hidden_states.device, non_blocking=True)
        kernel = self._kernels[id(residents[0].record)]
        return kernel.decode(hidden_states, residents[0].pool.base, on_device, top_k_weights)

    def combine(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return TritonExperts.combine(outputs, top_k_weights, hidden_states.dtype)

    def _run_alike(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        kernel, arena = self._kernels[id(residents[0].record)], residents[0].pool.base
        locations = [resident.location for resident in residents]
        places = [dispatch.places(resident.expert) for resident in residents]
        counts = [len(chosen) for chosen in places]

        def on_device(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).to(hidden_states.device, non_blocking=True)

        flat = on_device([place for chosen in places for place in chosen])
        tokens = flat // dispatch.top_k
        if self.path(dispatch.call_tokens) == 0:
            paired = on_device([one for one, count in zip(locations, counts, strict=True) for _ in range(count)])
            outputs[flat] = kernel.pairs(hidden_states, arena, tokens, paired)
        else:
            offsets = on_device([0, *accumulate(counts)])
            call = dispatch.call_tokens
            kernel.prefill(hidden_states, arena, on_device(locations), tokens, offsets, flat, outputs, call_tokens=call)
