"""The residual stream in front of each MoE layer's router, and that router folded with its norm, for lookahead.

The norm that feeds the experts is the one whose output is the very tensor they receive. Knows torch modules by their
shapes, not by their families.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from moeflow.hf import experts_interface
from moeflow.predictors.lookahead import Lookahead


class ResidualTap:
    """Keeps the input of the norm before each layer's experts, one pass at a time.

    Args:
        model: a model whose experts were taken off.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # layer -> {norm: (its input, its output)} of the pass under way
        self._latest: dict[int, dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._hooks: list[RemovableHandle] = []
        self.norms = {
            layer: _norms_around(model, path)
            for layer, (path, _) in enumerate(experts_interface.experts_modules(model))
        }

    def listen(self, wanted: bool) -> None:
        """Put the hooks on, or take them off: even an idle hook costs a layer some 20 us."""
        if len(self._hooks) == (sum(map(len, self.norms.values())) if wanted else 0):
            return
        self.close()
        if wanted:
            for layer, norms in self.norms.items():
                self._hooks += [norm.register_forward_hook(ResidualHook(self, layer)) for norm in norms]

    def residual(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the residual stream [T, H] of the pass whose experts receive hidden_states [T, H], if it was seen."""
        for norm, (before, after) in self._latest.pop(layer, {}).items():
            if after.data_ptr() == hidden_states.data_ptr() and after.numel() == hidden_states.numel():
                self.norms[layer] = [norm]  # the others' hooks go with the next pass
                return before.reshape(hidden_states.shape)
        return None

    def taken(self, layer: int) -> Callable[[], None] | None:
        """Take what was kept of a layer; return what keeps the same tensors again, None if there are none."""
        seen = self._latest.pop(layer, None)
        return None if seen is None else lambda: self._latest.update({layer: dict(seen)})

    def owns(self, hook: object) -> bool:
        """Whether a forward hook is one of this tap's."""
        return isinstance(hook, ResidualHook) and hook.is_of(self)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._latest.clear()

    def keep(self, layer: int, norm: torch.nn.Module, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take in what a norm near a layer's experts made of what."""
        self._latest.setdefault(layer, {})[norm] = before.detach(), after.detach()


class ResidualHook:
    """Shows a tap what one norm does. A native step need not run it: its program knows the residual stream.

    Args:
        tap: that keeps it.
        layer: number among the MoE layers.
    """

    def __init__(self, tap: ResidualTap, layer: int) -> None:
        self._tap = weakref.ref(tap)
        self._layer = layer

    def is_of(self, tap: ResidualTap) -> bool:
        """Whether it shows to this tap."""
        return self._tap() is tap

    @torch.compiler.disable
    def __call__(self, norm: torch.nn.Module, args: tuple, output: Any) -> None:
        """Take in a call of the norm."""
        tap = self._tap()
        if tap is not None and args and isinstance(output, torch.Tensor) and not torch.compiler.is_exporting():
            tap.keep(self._layer, norm, args[0], output)


def build_lookahead(model: torch.nn.Module, top_k: int) -> Lookahead | None:
    """Fold each layer's norm and router; None where no layer's can be.

    Of several norms the last one before the MoE block is taken; Lookahead checks on the first tokens whether it is the
    right one.

    Args:
        model: its routers loaded.
        top_k: experts a token is routed to.
    """
    routers, biases, eps = [], [], []
    for path, _ in experts_interface.experts_modules(model):
        weight, bias = experts_interface.router_parameters(model.get_submodule(path.rpartition(".")[0]))
        norms = _norms_around(model, path)
        if weight is not None:  # a norm of attention heads, or one without a weight, does not feed a router
            norms = [norm for norm in norms if getattr(norm, "weight", None) is not None]
            norms = [norm for norm in norms if norm.weight.shape == weight.shape[1:]]
        known = weight is not None and len(norms) > 0
        routers.append(weight * _scale(norms[-1], weight) if weight is not None and norms else None)
        biases.append(bias)
        eps.append(_eps(norms[-1]) if known else 0.0)
    if all(router is None for router in routers):
        return None
    return Lookahead(routers, biases, eps, top_k)


def _norms_around(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """List the norms beside the MoE block and inside it, in the order they are registered."""
    block = path.rpartition(".")[0]
    layer = model.get_submodule(block.rpartition(".")[0])
    return [
        module
        for name, module in layer.named_modules()
        if name.count(".") <= 1
        and "norm" in type(module).__name__.lower()
        and not list(module.children())
        and not name.startswith(("self_attn.", "attention."))
    ]


@torch.no_grad()
def _scale(norm: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    """Return the factor of a root-mean-square norm's normalised input: [H]."""
    return norm(torch.ones(1, like.shape[1], dtype=like.dtype, device=like.device))[0]


def _eps(norm: torch.nn.Module) -> float:
    return next((float(v) for n in ("variance_epsilon", "eps") if (v := getattr(norm, n, None)) is not None), 1e-6)
