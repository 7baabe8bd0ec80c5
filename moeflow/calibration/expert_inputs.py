"""Inputs of experts: the hidden states of calibration tokens in front of each MoE layer, and their routes.

GPTQ asks for them expert by expert. Kept in the model's own dtype: T x H values a layer.

Knows hooks of a model. Knows nothing of how it was loaded.
"""

import hashlib
import json
from collections.abc import Callable

import torch

from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.kernels.expert_mlp import hidden_activations
from moeflow.progress import ProgressCallback

_BATCH_WINDOWS = 8


class ExpertInputs:
    """The inputs of every expert's matrices on calibration tokens.

    Args:
        fingerprint: names the tokens they come from.
        modules: [num_layers], the experts modules, for their activations.
    """

    def __init__(self, fingerprint: str, modules: list[ExpertsModule]) -> None:
        self.fingerprint = fingerprint
        self._modules = modules
        self._hidden_states: list[list[torch.Tensor]] = [[] for _ in modules]
        self._routes: list[list[torch.Tensor]] = [[] for _ in modules]

    def add(self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Take in the arguments of one layer's experts: [T, H] and [T, K]."""
        self._hidden_states[layer].append(hidden_states.cpu().clone())
        self._routes[layer].append(top_k_index.cpu().to(torch.int32))

    def inputs(self, layer: int, expert: int, name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the inputs of one matrix of an expert.

        Args:
            layer: number among the MoE layers.
            expert: its number.
            name: of the matrix.
            weights: the expert's unquantised parameters, as the module has them.

        Returns:
            [n, K] float32, a row for each calibration token that is routed to the expert.
        """
        seen = [
            hidden[(routes == expert).any(-1)]
            for hidden, routes in zip(self._hidden_states[layer], self._routes[layer], strict=True)
        ]
        hidden = torch.cat(seen).float()
        if name != "down_proj":
            return hidden
        module = self._modules[layer]
        return hidden_activations(
            hidden,
            {name: value.float() for name, value in weights.items()},
            activation=experts_interface.activation_of(module),
            is_transposed=module.is_transposed,
        )


@torch.no_grad()
def record_inputs(
    model: torch.nn.Module, windows: list[list[int]], *, progress: ProgressCallback | None = None
) -> ExpertInputs:
    """Run a model over text and keep the inputs of its experts.

    Args:
        model: from load_moe or from_pretrained.
        windows: token ids of pieces of text, all of one length.
        progress: called with (windows done, windows in all).
    """
    modules = [module for _, module in experts_interface.experts_modules(model)]
    found = ExpertInputs(hashlib.sha256(json.dumps(windows).encode()).hexdigest(), modules)

    def watch(layer: int) -> Callable[[torch.nn.Module, tuple, dict], None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            hidden_states, top_k_index, _ = experts_interface.experts_arguments(args, kwargs)
            found.add(layer, hidden_states, top_k_index)

        return hook

    handles = [module.register_forward_pre_hook(watch(layer), with_kwargs=True) for layer, module in enumerate(modules)]
    device = next(model.parameters()).device
    try:
        for first in range(0, len(windows), _BATCH_WINDOWS):
            rows = torch.tensor(windows[first : first + _BATCH_WINDOWS], device=device)
            model(input_ids=rows, use_cache=False, logits_to_keep=1)
            if progress is not None:
                progress(min(first + _BATCH_WINDOWS, len(windows)), len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return found
