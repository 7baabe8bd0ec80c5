"""Routes to learn from, as plain arrays: the input of training, from whichever file they came."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Routes:
    """Sequences of routes.

    Args:
        token_ids: S arrays [T] of the tokens fed, one array a sequence, T its length.
        experts: S arrays [T, L, K], by falling weight; num_experts or more stands for none.
        weights: S arrays [T, L, K], or None where they are not known.
        num_experts: E, the largest number of experts in a layer.
    """

    token_ids: list[np.ndarray]
    experts: list[np.ndarray]
    weights: list[np.ndarray] | None
    num_experts: int

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_layers(self) -> int:
        return self.experts[0].shape[1]

    @property
    def top_k(self) -> int:
        return self.experts[0].shape[2]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def select(self, sequences: Iterable[int]) -> "Routes":
        """Return these sequences alone, by their numbers here."""
        numbers = list(sequences)

        def pick(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [arrays[s] for s in numbers]

        weights = pick(self.weights) if self.weights is not None else None
        return Routes(pick(self.token_ids), pick(self.experts), weights, self.num_experts)

    def cut(self, length: int) -> "Routes":
        """Return the same routes with longer sequences cut into pieces of at most `length` tokens."""

        def pieces(arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [array[i : i + length] for array in arrays for i in range(0, len(array), length)]

        weights = pieces(self.weights) if self.weights is not None else None
        return Routes(pieces(self.token_ids), pieces(self.experts), weights, self.num_experts)
