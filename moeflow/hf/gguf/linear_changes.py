"""What llama.cpp's converter does to linear attention's tensors. Knows shapes, and nothing of names or files.

Value heads that share a key head are neighbours in the model. Some architectures' files take them in turns instead:
first the first value head of every key head, then every second one.
"""

from collections.abc import Callable
from typing import Any

import torch

from moeflow.hf.gguf.architecture import Change


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
    """Rows of value heads, which the file has in turns.

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
