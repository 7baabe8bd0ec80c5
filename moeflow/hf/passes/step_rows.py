"""The rows of a step: one new token of each of some sequences, and where their earlier positions lie."""

from typing import NamedTuple, Protocol

import numpy as np
import torch

from moeflow.hf.passes.caches.growing_cache import KeptShape


class KeptRows(Protocol):
    """Where sequences keep their positions: a cache of `generate`, or slots of the engine."""

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
