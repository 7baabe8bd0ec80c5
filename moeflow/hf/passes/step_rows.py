"""The rows of a step: one new token of each of some sequences, and where their earlier positions lie."""

from typing import NamedTuple, Protocol

import numpy as np
import torch

from moeflow.hf.passes.caches.growing_cache import GrowingCache, KeptShape

EXACT_ROWS = 8
"""Rows of a native step up to which each has the bits that it has alone: the most tokens of one sequence in a step."""


class KeptRows(Protocol):
    """Where sequences keep their positions: a cache of `generate`, for one token or several, or slots of the engine."""

    @property
    def lengths(self) -> np.ndarray:
        """[rows] or [1], positions kept of each sequence."""
        ...

    @property
    def record_format(self) -> int:
        """The number of the format of their records in the library; 0 where keys and values are kept as they are."""
        ...

    def fits(self, layers: dict[int, KeptShape], num_rows: int) -> bool:
        """Whether these layers, by their numbers, are kept of so many sequences in these shapes."""
        ...

    def table(self, layers: dict[int, KeptShape]) -> np.ndarray:
        """Return where keys and values of layers lie that fit, with room for one more position.

        Returns:
            [layers, rows, 3] int64: addresses of keys and of values, and the positions that there is room for.
        """
        ...

    def advance(self, layers: dict[int, KeptShape]) -> None:
        """Count the position that a step has written."""
        ...


class SpanRows:
    """Tokens of one sequence behind each other, as rows that share its cache: each attends to those before it too.

    A step keeps the keys and values of all its rows before any attends.

    Args:
        cache: of the one sequence.
        count: tokens.
    """

    record_format = 0  # keys and values are kept as they are

    def __init__(self, cache: GrowingCache, count: int) -> None:
        self._cache, self._count = cache, count

    @property
    def lengths(self) -> np.ndarray:
        """[rows], positions before each token."""
        return self._cache.length + np.arange(self._count)

    def fits(self, layers: dict[int, KeptShape], num_rows: int) -> bool:
        """Whether these layers are kept of one sequence in these shapes, and the tokens are as many as the rows."""
        return num_rows == self._count and self._cache.fits(layers, 1)

    def table(self, layers: dict[int, KeptShape]) -> np.ndarray:
        """Return where the sequence's keys and values lie, once for each row: [layers, rows, 3]."""
        return self._cache.table(layers, self._count).repeat(self._count, axis=1)

    def advance(self, layers: dict[int, KeptShape]) -> None:
        """Count the positions that a step has written."""
        self._cache.advance(layers, self._count)


class StepRows(NamedTuple):
    """One step of some sequences.

    Args:
        kept: what they have.
        input_ids: [rows, 1].
        positions: [rows], of the tokens.
        firsts: [rows], the first position kept that is not padding; None where there is no padding.
    """

    kept: KeptRows
    input_ids: torch.Tensor
    positions: torch.Tensor
    firsts: torch.Tensor | None = None
