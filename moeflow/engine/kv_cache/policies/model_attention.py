"""A model's own attention over rows that a policy has chosen."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moeflow.engine.kv_cache.policies.protocol import Attend
from moeflow.engine.kv_cache.segment_masks import added
from moeflow.hf.passes import attention


def model_attention(module: torch.nn.Module, implementation: str, kwargs: dict[str, Any]) -> tuple[Attend, Attend]:
    """Return what attends, and what returns the weights in place of that.

    Args:
        module: the attention module.
        implementation: "sdpa" or "eager".
        kwargs: what the module gives its attention beside queries, keys, values and mask.
    """
    attends = partial(_run, module, implementation, kwargs, 0)
    return attends, partial(_run, module, "eager", kwargs, 1)


def attend_all(
    module: torch.nn.Module,
    implementation: str,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Callable[[], torch.Tensor | None],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attend to all positions by the model's own rule.

    Args:
        module: the attention module.
        implementation: "sdpa" or "eager".
        given: queries, keys and values.
        mask: makes the mask, as the implementation takes it.
        kwargs: as of `model_attention`.

    Returns:
        [1, new, H, features].
    """
    return attention.attention_function(module, implementation)(module, *given, mask(), **kwargs)[0]


def has_weights(module: torch.nn.Module) -> bool:
    """Return whether a module's model has an eager attention, which returns weights."""
    return attention.attention_function(module, "eager") is not None


def _run(
    module: torch.nn.Module,
    implementation: str,
    kwargs: dict[str, Any],
    side: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    mask = allowed
    if allowed is not None and implementation == "eager":
        mask = added(allowed, queries.dtype)
    return attention.attention_function(module, implementation)(module, queries, keys, values, mask, **kwargs)[side]
