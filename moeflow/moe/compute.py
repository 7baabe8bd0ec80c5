"""The arithmetic behind one layer's experts: which kernels run it, chosen once from module, records and device.

Every choice computes a token's output of an expert from that token and that expert alone, in an order that depends on
how many tokens go to the expert and on nothing else, so that the bits do not depend on what is resident.
"""

import weakref
from itertools import accumulate
from typing import Protocol

import torch

from moeflow.core import RecordLayout
from moeflow.hf import experts_interface
from moeflow.kernels.activations import Activation, recognise
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel
from moeflow.kernels.expert_mlp import combine, expert_mlp
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.triton.experts import TritonExperts
from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident

# Tokens of a pass up to which a GPU multiplies pair by pair; beyond, experts are multiplied with all their tokens.
_MOST_PAIRED_TOKENS = 16


class ExpertCompute(Protocol):
    """Runs experts of one layer. `begin`, then `run` for every part of the experts, then `end`."""

    def begin(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Return room for the outputs of every place: [T * K, H], zero where no expert writes."""

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        """Write the outputs of these experts to their places."""

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run all K experts of a single token and sum them, with the bits of the other three: [1, H]."""

    def end(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Sum each token's outputs by router weight, in float32 and in the order of K: [T, H]."""


class TorchCompute:
    """Plain torch, for whatever a module does and wherever its weights lie.

    Args:
        module: the experts module, whose parameters were taken off.
    """

    def __init__(self, module: torch.nn.Module):
        self._module = weakref.ref(module)  # the module holds this object, not the other way round

    def begin(self, hidden_states, dispatch):
        return hidden_states.new_zeros(dispatch.num_places, hidden_states.shape[-1])

    def run(self, hidden_states, residents, dispatch, outputs):
        for resident in residents:
            chosen = dispatch.places(resident.expert)
            if dispatch.num_tokens == 1:
                outputs[chosen] = self._mlp(hidden_states, resident)
            else:
                places = torch.tensor(chosen, device=hidden_states.device)
                outputs[places] = self._mlp(hidden_states[places // dispatch.top_k], resident)

    def run_token(self, hidden_states, residents, dispatch, top_k_weights):
        return _run_apart(self, hidden_states, residents, dispatch, top_k_weights)

    def end(self, hidden_states, outputs, top_k_weights):
        return combine(outputs.view(*top_k_weights.shape, -1), top_k_weights)

    def _mlp(self, hidden_states, resident):
        """Run one expert on [n, H] tokens where its weights are. Returns [n, H] where the tokens are."""
        module, weights, dtype = self._module(), resident.tensors(), hidden_states.dtype
        for name, form, shape in resident.record.matrices:
            weights = {**weights, name: dequantize(weights, name, find_format(form), shape, dtype)}
        output = expert_mlp(
            hidden_states.to(resident.pool.device),
            weights,
            activation=experts_interface.activation_of(module),
            is_transposed=module.is_transposed and not resident.record.matrices,
        ).to(hidden_states.device)
        # The norm's own weight stays on the device.
        return experts_interface.post_norm(module, output)


class CpuCompute:
    """The compiled kernels, straight from the records.

    Args:
        activation: what the module does between its matrices.
        is_transposed: whether float matrices are stored [in, out].
        activation_bits: of activations that meet integer codes: 16 where they were rounded to a half precision before
            anyway, else 0 for float32.
    """

    def __init__(self, activation: Activation, is_transposed: bool, activation_bits: int):
        self._activation = activation
        self._is_transposed = is_transposed
        self._bits = activation_bits
        self._kernels: dict[int, ExpertKernel | None] = {}  # by the record's identity: equal ones are one object

    def can_run(self, records: list[RecordLayout]) -> bool:
        """Whether there is a kernel for each of these."""
        return instruction_set() is not None and all(self._kernel(record) is not None for record in records)

    def begin(self, hidden_states, dispatch):
        shape = dispatch.num_places, hidden_states.shape[-1]
        return torch.empty(shape) if dispatch.is_whole else torch.zeros(shape)

    def run(self, hidden_states, residents, dispatch, outputs):
        starts, places = [0], []
        for resident in residents:
            places += dispatch.places(resident.expert)
            starts.append(len(places))
        cpu.run_experts(
            hidden_states,
            [self._kernel(resident.record) for resident in residents],
            [resident.address for resident in residents],
            starts,
            [place // dispatch.top_k for place in places],
            places,
            outputs,
            activation_bits=self._bits,
        )

    def run_token(self, hidden_states, residents, dispatch, top_k_weights):
        ordered = sorted(residents, key=lambda resident: dispatch.places(resident.expert))
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        cpu.run_token(
            hidden_states.contiguous(),
            [self._kernel(resident.record) for resident in ordered],
            [resident.address for resident in ordered],
            top_k_weights.contiguous(),
            out,
            activation_bits=self._bits,
        )
        return out

    def end(self, hidden_states, outputs, top_k_weights):
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        cpu.combine(outputs, top_k_weights, out)
        return out

    def _kernel(self, record):
        key = id(record)
        if key not in self._kernels:
            self._kernels[key] = ExpertKernel.build(record, self._activation, is_transposed=self._is_transposed)
        return self._kernels[key]


def _run_apart(compute, hidden_states, residents, dispatch, top_k_weights):
    outputs = compute.begin(hidden_states, dispatch)
    compute.run(hidden_states, residents, dispatch, outputs)
    return compute.end(hidden_states, outputs, top_k_weights)


class TritonCompute:
    """Triton's kernels, straight from the device's slots. Not yet measured on a GPU.

    Args:
        module: the experts module, for experts that the CPU computes in the host tier.
        activation: what the module does between its matrices.
    """

    def __init__(self, module: torch.nn.Module, activation: Activation):
        self._torch = TorchCompute(module)
        self._activation = activation
        self._is_transposed = module.is_transposed
        self._kernels: dict[int, TritonExperts | None] = {}  # by the record's identity: equal ones are one object

    def can_run(self, records: list[RecordLayout]) -> bool:
        """Whether there is a kernel for each of these."""
        return all(self._kernel(record) is not None for record in records)

    def begin(self, hidden_states, dispatch):
        return hidden_states.new_zeros(dispatch.num_places, hidden_states.shape[-1], dtype=torch.float32)

    def run(self, hidden_states, residents, dispatch, outputs):
        alike: dict[int, list[Resident]] = {}
        for resident in residents:
            if resident.pool.device == hidden_states.device:
                alike.setdefault(id(resident.record), []).append(resident)
            else:
                self._torch.run(hidden_states, [resident], dispatch, outputs)
        for group in alike.values():
            self._run_alike(hidden_states, group, dispatch, outputs)

    def run_token(self, hidden_states, residents, dispatch, top_k_weights):
        if len({id(resident.record) for resident in residents}) > 1 or residents[0].pool.device != hidden_states.device:
            return _run_apart(self, hidden_states, residents, dispatch, top_k_weights)
        slots = [0] * dispatch.top_k
        for resident in residents:
            slots[dispatch.places(resident.expert)[0]] = resident.slot
        on_device = torch.tensor([slots], dtype=torch.int32).to(hidden_states.device, non_blocking=True)
        kernel = self._kernel(residents[0].record)
        return kernel.decode(hidden_states, residents[0].pool.tensor, on_device, top_k_weights)

    def end(self, hidden_states, outputs, top_k_weights):
        return TritonExperts.combine(outputs, top_k_weights, hidden_states.dtype)

    def _run_alike(self, hidden_states, residents, dispatch, outputs):
        kernel, arena = self._kernel(residents[0].record), residents[0].pool.tensor
        slots = [resident.slot for resident in residents]
        places = [dispatch.places(resident.expert) for resident in residents]
        counts = [len(chosen) for chosen in places]

        def on_device(values):
            return torch.tensor(values, dtype=torch.int32).to(hidden_states.device, non_blocking=True)

        flat = on_device([place for chosen in places for place in chosen])
        tokens = flat // dispatch.top_k
        if dispatch.num_tokens <= _MOST_PAIRED_TOKENS:
            paired = on_device([slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)])
            outputs[flat] = kernel.pairs(hidden_states, arena, tokens, paired)
        else:
            offsets = on_device([0, *accumulate(counts)])
            kernel.prefill(hidden_states, arena, on_device(slots), tokens, offsets, flat, outputs)

    def _kernel(self, record):
        key = id(record)
        if key not in self._kernels:
            self._kernels[key] = TritonExperts.build(record, self._activation, is_transposed=self._is_transposed)
        return self._kernels[key]


def choose_compute(
    module: torch.nn.Module, records: list[RecordLayout], device: torch.device, dtype: torch.dtype
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
    if device.type == "cpu":
        compute = CpuCompute(activation, module.is_transposed, 0 if dtype == torch.float32 else 16)
    else:
        compute = TritonCompute(module, activation)
    return compute if compute.can_run(records) else TorchCompute(module)
