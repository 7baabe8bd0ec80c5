"""Runs experts in plain torch: any module, any format, any device."""

import weakref

import torch

from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.kernels.expert_mlp import combine, expert_mlp
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.moe.compute import run_apart
from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident


class TorchCompute:
    """Plain torch, for any activation or norm of a module and for weights on any device.

    Args:
        module: the experts module, whose parameters were taken off.
    """

    def __init__(self, module: ExpertsModule) -> None:
        self._module = weakref.ref(module)  # the module holds this object

    def path(self, call_tokens: int) -> int:
        return 0

    def allocate_outputs(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return hidden_states.new_zeros(dispatch.num_places, hidden_states.shape[-1])

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        for resident in residents:
            chosen = dispatch.places(resident.expert)
            if dispatch.num_tokens == 1:
                outputs[chosen] = self._mlp(hidden_states, resident)
            else:
                places = torch.tensor(chosen, device=hidden_states.device)
                outputs[places] = self._mlp(hidden_states[places // dispatch.top_k], resident)

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return run_apart(self, hidden_states, residents, dispatch, top_k_weights)

    def combine(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return combine(outputs.view(*top_k_weights.shape, -1), top_k_weights)

    def _mlp(self, hidden_states: torch.Tensor, resident: Resident) -> torch.Tensor:
        """Run one expert on [n, H] tokens where its weights are. Returns [n, H] where the tokens are."""
        module, weights, dtype = self._module(), resident.tensors(), hidden_states.dtype
        assert module is not None, "the module of these experts is gone"
        for name, form, shape in resident.record.matrices:
            weights = {**weights, name: dequantize(weights, name, find_format(form), shape, dtype)}
        if any(weight.dtype != dtype and weight.is_floating_point() for weight in weights.values()):
            weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
        output = expert_mlp(
            hidden_states.to(resident.pool.device),
            weights,
            activation=experts_interface.activation_of(module),
            is_transposed=module.is_transposed and not resident.record.matrices,
        ).to(hidden_states.device)
        # The norm's own weight stays on the device.
        return experts_interface.post_norm(module, output)
