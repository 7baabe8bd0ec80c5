"""Masks of packed passes: a model's rule, from which each sequence's tensor is made once a pass."""

from functools import cached_property
from typing import Protocol

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes import attention
from moeflow.hf.passes.attention import MaskRule


class NewPositions(Protocol):
    """The new tokens of one sequence in a pass: `num_new` positions from `start` up to, without it, `end`."""

    @property
    def start(self) -> int:
        """The first."""
        ...

    @property
    def num_new(self) -> int:
        """Their number."""
        ...

    @property
    def end(self) -> int:
        """Positions that there are with them."""
        ...


class SegmentMasks:
    """A mask by its rule, from which each segment's tensor is made once a pass."""

    def __init__(self, allowed: MaskRule) -> None:
        self._allowed = allowed  # (batch, head, query position, key position) -> bool
        self._made: dict[tuple[int, bool], torch.Tensor | None] = {}

    @property
    def is_causal(self) -> bool:
        """Whether one sees all positions before it."""
        return self._allowed is attention.causal_rule

    @cached_property
    def most_seen(self) -> int:
        """Most positions that one sees, its window or chunk; 0 where there is none, or the rule is another."""
        try:
            return max(attention.window_and_chunk(self._allowed))
        except (UnsupportedModelError, RuntimeError, LookupError):  # a rule may look at tensors of a whole batch
            return 0

    def of(self, index: int, segment: NewPositions, query: torch.Tensor, eager: bool) -> torch.Tensor | None:
        """Return a segment's mask [1, 1, count, end], floats to add for eager, else bool; None where all is allowed."""
        key = index, eager
        if key not in self._made:
            self._made[key] = self._make(segment, query, eager)
        return self._made[key]

    def _make(self, segment: NewPositions, query: torch.Tensor, eager: bool) -> torch.Tensor | None:
        if self.is_causal and (segment.num_new == 1 or (segment.start == 0 and not eager)):
            return None  # sdpa masks what comes later where it gets as many queries as keys
        queries = torch.arange(segment.start, segment.end, device=query.device)[:, None]
        keys = torch.arange(segment.end, device=query.device)[None, :]
        allowed = self._allowed(0, 0, queries, keys)
        if segment.num_new == 1 and bool(allowed.all()):
            return None
        return (added(allowed, query.dtype) if eager else allowed)[None, None]


def added(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a bool mask as the floats that eager attention adds."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
