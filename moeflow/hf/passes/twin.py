"""A second tree of a model's modules over the same weights: torch.export changes what it captures while it works."""

from typing import Any

import torch


def twin_of(model: torch.nn.Module) -> Any:
    """Return a model of the same weights and attributes, in modules of its own.

    Meanwhile other threads may run the model, and an interrupt leaves it as it was. What stands in for a module's
    forward does not come along.

    Args:
        model: stays as it is.
    """
    return _twin(model, {})


def _twin(module: torch.nn.Module, made: dict[int, torch.nn.Module]) -> torch.nn.Module:
    twin = made.get(id(module))
    if twin is None:
        twin = made[id(module)] = object.__new__(type(module))
        own = vars(twin)
        own.update(vars(module))
        own.pop("forward", None)
        for name in ("_parameters", "_buffers"):
            own[name] = dict(own[name])
        own["_modules"] = {
            name: child if child is None else _twin(child, made) for name, child in module._modules.items()
        }
    return twin
