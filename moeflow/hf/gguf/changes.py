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


class LatentHeads:
    """The projection from the latent to keys and values: in the file apart, and the keys transposed in each head.

    The parameter [heads * (key + value), rank] has each head's rows of keys (without positions), then of values. The
    file has keys [heads, rank, key] and values [heads, value, rank].
    """

    moves_rows = False

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        keys, values = tensors
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        keys = keys.reshape(heads, rank, config.qk_nope_head_dim).transpose(1, 2)
        values = values.reshape(heads, config.v_head_dim, rank)
        return torch.cat([keys, values], dim=1).reshape(-1, rank)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        heads = parameter.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return [keys.transpose(1, 2).contiguous(), values.contiguous()]


class InTurn:
    """Changes one after another, each of one tensor.

    Args:
        changes: in the order in which a file is read.
    """

    def __init__(self, *changes: Change) -> None:
        self._changes = changes
        self.moves_rows = all(change.moves_rows for change in changes)

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        for change in self._changes:
            tensors = [change.read(tensors, config)]
        return tensors[0]

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        for change in reversed(self._changes):
            (parameter,) = change.write(parameter, config)
        return [parameter]


class ValueHeadRows:
    """Rows of linear attention's value heads, which the file has in turns.

    Value heads that share a key head are neighbours in the model. In such a file, first comes the first value head of
    every key head, then every second one.

    Args:
        whole: whether each head has a row for each of its dimensions, rather than one row.
        after: a config -> how many rows before them stay.
    """

    moves_rows = True

    def __init__(self, *, whole: bool, after: Callable[[Any], int] = lambda config: 0) -> None:
        self._whole, self._after = whole, after

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        return self._swapped(found, config, (values // keys, keys))

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        return [self._swapped(parameter, config, (keys, values // keys))]

    def _swapped(self, tensor: torch.Tensor, config: Any, counts: tuple[int, int]) -> torch.Tensor:
        size = config.linear_value_head_dim if self._whole else 1
        before, rows = tensor[: self._after(config)], tensor[self._after(config) :]
        heads = rows.reshape(*counts, size, *rows.shape[1:]).transpose(0, 1)
        return torch.cat([before, heads.reshape(rows.shape)])


class ValueHeadColumns:
    """Columns that value heads meet, which the file has in turns."""

    moves_rows = False

    def __init__(self) -> None:
        self._rows = ValueHeadRows(whole=True)

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return self._rows.read([found.T], config).T.contiguous()

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        (written,) = self._rows.write(parameter.T, config)
        return [written.T.contiguous()]


class GroupedProjections:
    """A projection that gives each key head its query, key, values and gates in one run of rows.

    The file has two tensors: all queries, then keys, then values; and the gates.
    """

    moves_rows = True

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        mixed, gates = tensors
        heads, (key, _, value, _) = config.linear_num_key_heads, self._sizes(config)
        parts = [*mixed.split([heads * key, heads * key, heads * value]), gates]
        grouped = [part.reshape(heads, -1, part.shape[-1]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, gates.shape[-1])

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        columns = parameter.shape[-1]
        grouped = parameter.reshape(config.linear_num_key_heads, -1, columns)
        *mixed, gates = (part.reshape(-1, columns) for part in grouped.split(self._sizes(config), dim=1))
        return [torch.cat(mixed), gates]

    def _sizes(self, config: Any) -> list[int]:
        values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
        return [config.linear_key_head_dim, config.linear_key_head_dim, values, values]


class Reshaped:
    """The same numbers in the same order, in another shape.

    Args:
        written: a config -> the shape in the file. The parameter has one dimension.
    """

    moves_rows = False

    def __init__(self, written: Callable[[Any], tuple[int, ...]]) -> None:
        self._written = written

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return found.reshape(-1)

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [parameter.reshape(self._written(config))]
