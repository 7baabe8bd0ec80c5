"""What llama.cpp's converter does to tensors besides renaming them, and back. `write` is the inverse of `read`.

Knows shapes. Knows nothing of names, files or blocks.
"""

from collections.abc import Callable
from typing import Any

import torch

from moeflow.hf.gguf.architecture import Change

Count = Callable[[Any], int]  # of a config


class PermuteForRope:
    """Rows of a q or k projection: pairs in the file (0, half, 1, half + 1, ..), halves in the model, in each head.

    Args:
        heads: a config -> the number of heads that the projection makes.
    """

    moves_rows = True

    def __init__(self, heads: Count) -> None:
        self._heads = heads

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return self._swapped(found, config, (-1, 2))

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [self._swapped(parameter, config, (2, -1))]

    def _swapped(self, tensor: torch.Tensor, config: Any, halves: tuple[int, int]) -> torch.Tensor:
        heads = tensor.reshape(self._heads(config), *halves, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)


class PlusOne:
    """A norm's weights, which the file holds with the one that the model's norm adds, in float32."""

    moves_rows = False

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return found.float() - 1

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [parameter.float() + 1]


class LogNegate:
    """The decay of a linear attention: -exp(parameter) in the file."""

    moves_rows = False

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return torch.log(-found.float())

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [-torch.exp(parameter.float())]


class Squeeze:
    """A dimension of one that the file leaves out. Files that hold it are read as well.

    Args:
        dimension: which, in the parameter.
        dimensions: of the parameter.
    """

    def __init__(self, dimension: int, dimensions: int) -> None:
        self._dimension, self._dimensions = dimension, dimensions
        self.moves_rows = dimension == 0  # [1, K] of [K]: its one row stays whole

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return found if found.dim() == self._dimensions else found.unsqueeze(self._dimension)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [parameter.squeeze(self._dimension)]


class Joined:
    """A parameter whose rows the file holds as several tensors, one after another.

    Args:
        parts: a config -> rows of each.
    """

    moves_rows = True

    def __init__(self, parts: Callable[[Any], list[int]]) -> None:
        self._parts = parts

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        return torch.cat(tensors)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return list(parameter.split(self._parts(config)))


class RowsOf:
    """A parameter that is some of the rows of the file's tensor. Only read: the file's other rows are elsewhere.

    Args:
        part: which of the parts, counted from 0.
        parts: a config -> rows of each.
        change: of the part.
    """

    def __init__(self, part: int, parts: Callable[[Any], list[int]], change: Change) -> None:
        self._part, self._parts, self._change = part, parts, change
        self.moves_rows = change.moves_rows

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return self._change.read([found.split(self._parts(config))[self._part]], config)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        raise NotImplementedError("rows of a tensor are written with the tensor's other rows")
