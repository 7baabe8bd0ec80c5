"""The forward of an experts module as its family wrote it, on one expert alone."""

from typing import Any

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.experts_interface import ExpertsModule


def run_expert(
    module: ExpertsModule,
    weights: dict[str, torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run one expert by transformers' own eager code, which sums experts one after the other: this is one summand.

    Args:
        module: the experts module, whose parameters may be taken off.
        weights: the expert's parameters by name.
        hidden_states: [n, H], tokens that are routed to the expert.
        top_k_weights: [n], its weight for each.

    Returns:
        [n, H], weighted.

    Raises:
        UnsupportedModelError: the module's class has no eager forward.
    """
    alone: Any = object.__new__(_family_class(module))
    alone.__dict__ = {name: value for name, value in vars(module).items() if name not in ("_moeflow", "_absent")}
    alone.__dict__["_parameters"] = {name: value.unsqueeze(0) for name, value in weights.items()}
    alone.__dict__["num_experts"] = 1
    index = torch.zeros(len(hidden_states), 1, dtype=torch.int64, device=hidden_states.device)
    return _eager(type(alone))(alone, hidden_states, index, top_k_weights.unsqueeze(1))


def _family_class(module: ExpertsModule) -> type:
    """Return the class as transformers has it, of a module whose class may be one that moeflow put before it."""
    for one in type(module).__mro__:
        if hasattr(vars(one).get("forward"), "__wrapped__"):
            return one
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager forward of its own to compare with in this version of transformers."
    )


def _eager(family: type) -> Any:
    return family.forward.__wrapped__  # type: ignore[attr-defined]
