"""The order in which a packed folder is written: shard by shard, each part when the last shard that it needs is there.

Knows which shards hold a part's bytes. Knows nothing of who writes it.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.core import ExpertKey

_BEHIND_ALL = 1 << 62


class Part(NamedTuple):
    """A dense tensor, by its name, or an expert.

    Args:
        what: which.
        shards: numbers of the shards that hold its bytes, ascending; none of an expert in a packed file.
    """

    what: str | ExpertKey
    shards: tuple[int, ...]

    @property
    def last_shard(self) -> int:
        """The shard at whose turn it is written; what needs none comes behind all."""
        return self.shards[-1] if self.shards else _BEHIND_ALL


def order_parts(dense: Mapping[str, TensorEntry], layers: list[LayerSource], *, packed: bool) -> list[Part]:
    """Return all parts in the order in which they are written.

    Args:
        dense: the dense tensors, by name.
        layers: [num_layers], the sources of records.
        packed: whether these lie in a packed file beside the shards.
    """
    parts = [Part(name, (entry.file,)) for name, entry in dense.items()]
    for number, source in enumerate(layers):
        tables = [] if packed else list(source.pieces())
        for expert in range(source.layout.num_experts):
            shards = {table.files[expert] for table in tables}
            parts.append(Part(ExpertKey(number, expert), tuple(sorted(shards))))
    return sorted(parts, key=lambda part: part.last_shard)


def cut_turns(parts: list[Part]) -> list[list[Part]]:
    """Return ordered parts in turns: those of a turn have the same last shard."""
    return [list(turn) for _, turn in groupby(parts, key=lambda part: part.last_shard)]


def shards_of(turn: list[Part]) -> frozenset[int]:
    """Return the numbers of all shards that a turn needs."""
    return frozenset(number for part in turn for number in part.shards)
