"""Runs of kept tokens: the nodes of a prefix tree, and what each keeps.

Knows token ids, slots and windows. Knows nothing of the order in which they leave.
"""

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import WindowPart


@dataclass(eq=False)
class Node:
    """A run of tokens that no kept sequence leaves in the middle.

    Args:
        tokens: the run; none in a root.
        slot: their keys and values, and no others, in layers without a window; none in a root.
        parent: the node of the run before; none in a root.
        children: the runs behind it, by their first token.
        begin: tokens before the run.
        parts: what is kept of the run in layers with a window, each position once.
        used_s: when it was used, by the monotonic clock.
        written: is set once it is on a disk or cannot be, where it is on its way there; None elsewhere.
    """

    tokens: list[int] = field(default_factory=list)
    slot: KeyValueSlot | None = None
    parent: "Node | None" = None
    children: dict[int, "Node"] = field(default_factory=dict)
    begin: int = 0
    parts: list[WindowPart] = field(default_factory=list)
    used_s: float = field(default_factory=time.monotonic)
    written: threading.Event | None = None

    @property
    def end(self) -> int:
        """Tokens up to the end of the run."""
        return self.begin + len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept of the run."""
        assert self.slot is not None, "no root"
        return self.slot.nbytes + sum(part.nbytes for part in self.parts)

    @property
    def movable_bytes(self) -> int:
        """Those that another slot need not take beside these: a window may lie twice, in that slot and before it."""
        assert self.slot is not None, "no root"
        return self.slot.nbytes - max((part.nbytes for part in self.parts), default=0)


class Run(NamedTuple):
    """A node by itself.

    Args:
        scaling: of its keys.
        before: the tokens that lead to it.
        tokens: its own.
        slot: their keys and values in layers without a window.
        parts: those that are kept in layers with one.
    """

    scaling: Hashable
    before: list[int]
    tokens: list[int]
    slot: KeyValueSlot
    parts: list[WindowPart]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps."""
        return self.slot.nbytes + sum(part.nbytes for part in self.parts)


def up_from(node: Node) -> list[Node]:
    """Return a node and those before it, without the root."""
    path: list[Node] = []
    above: Node | None = node
    while above is not None and above.parent is not None:
        path.append(above)
        above = above.parent
    return path


def parts_between(node: Node, begin: int, end: int) -> list[WindowPart]:
    """Return what a node keeps between two places in layers with a window, with copies of what lies across one."""
    parts = [part for part in node.parts if part.begin < end and part.end > begin]
    return [
        part if begin <= part.begin and part.end <= end else part.cut(max(begin, part.begin), min(end, part.end))
        for part in parts
    ]
