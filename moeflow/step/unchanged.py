"""Whether a model still is what its programs were captured from: modules, weights, hooks."""

from typing import Any

import torch

from moeflow.hf.passes.residual import ResidualHook


class ModelState:
    """Modules and weights of a model as they are now.

    Args:
        model: that programs are captured from.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = list(model.modules())
        self._children: list[tuple[dict[str, Any], str, torch.nn.Module]] = [
            (module._modules, name, child) for module in self._modules for name, child in module.named_children()
        ]
        self._weights = [(weight, weight.data_ptr()) for weight in model.parameters()]

    def is_unchanged(self) -> bool:
        """Whether modules and weights are those of then, and no hook is on any but those of `ResidualTap`."""
        if any(_is_hooked(module) for module in self._modules):
            return False
        if any(children.get(name) is not child for children, name, child in self._children):
            return False
        return all(weight.data_ptr() == address for weight, address in self._weights)


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks
    return bool(module._forward_pre_hooks or (hooks and any(type(hook) is not ResidualHook for hook in hooks.values())))
