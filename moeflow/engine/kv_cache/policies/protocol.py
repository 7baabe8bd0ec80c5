"""What a policy of keys and values is, and the attention that it is asked about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moeflow.engine.kv_cache.layer_shape import LayerShape, Note
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import chosen_rows

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(queries, keys, values, allowed or None for all) -> what the model's own attention makes of them."""


@dataclass
class SegmentAttention:
    """The attention of one sequence's new tokens in one layer.

    Args:
        layer: which.
        slot: of the sequence; its rows have the new keys and values already.
        start: the position of the first new token.
        queries: [1, H, new, features].
        keys: of all rows, [1, heads, rows, features].
        values: likewise.
        exact: where nothing is forgotten, attends to all rows as without a policy; returns [1, new, H, features].
        attend: returns [1, new, H, features]; allowed is bool [1, 1 or H, new, rows].
        weigh: returns the weights [1, H, new, rows] instead, by the model's eager attention.
    """

    layer: int
    slot: KeyValueSlot
    start: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    exact: Callable[[], torch.Tensor]
    attend: Attend
    weigh: Attend

    @property
    def end(self) -> int:
        """Positions that there are with the new ones."""
        return self.start + self.queries.shape[2]

    @property
    def num_heads(self) -> int:
        """Heads of keys."""
        return self.keys.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a head of keys."""
        return self.queries.shape[1] // self.num_heads

    def attend_allowed(self, queries: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Attend to some rows; those of a single query are taken out first.

        Args:
            queries: some of all, [1, H, count, features].
            allowed: bool [heads, count, rows], as many of each head.
        """
        if queries.shape[2] == 1:
            rows = allowed[:, 0].nonzero()[:, 1].view(self.num_heads, -1)
            return self.attend(queries, chosen_rows(self.keys, rows), chosen_rows(self.values, rows), None)
        return self.attend(queries, self.keys, self.values, allowed.repeat_interleave(self.group, 0)[None])


@dataclass
class SeenPositions:
    """Counts of what queries saw, over layers and heads of keys.

    Args:
        attended: positions.
        whole: those that they would have seen without a policy.
    """

    attended: int = 0
    whole: int = 0

    def add(self, attended: int, call: SegmentAttention) -> None:
        """Take in the queries of a call, which saw so many positions in all heads."""
        self.attended += attended
        self.whole += _all_seen(call)

    def add_whole(self, call: SegmentAttention) -> None:
        """Take in the queries of a call, which saw all positions up to their own."""
        self.add(_all_seen(call), call)

    @property
    def share(self) -> float | None:
        """The share that was attended; None before any."""
        return self.attended / self.whole if self.whole else None


def _all_seen(call: SegmentAttention) -> int:
    return call.num_heads * (call.end * (call.end + 1) - call.start * (call.start + 1)) // 2


class KeyValuePolicy(Protocol):
    """Which rows of a sequence's slot its queries see, and which are let go.

    It acts in the layers whose queries see all positions before them. Its rule is of positions and never of the pieces
    in which they are computed. What a pass finds lies in `slot.found` until the next one, since a pass may run again.

    Attributes:
        name: as in `kv_policy`.
        forgets: whether rows are let go.
        weighs: whether it needs the weights of attention.
        seen: counts.
    """

    name: str
    forgets: bool
    weighs: bool
    seen: SeenPositions

    def note(self, shape: LayerShape) -> Note | None:
        """Return what it keeps beside the rows of a layer."""
        ...

    def most_rows(self, most_new: int) -> int | None:
        """Return the most rows of a slot, where a pass has at most so many new tokens; None for all positions."""
        ...

    def attend(self, call: SegmentAttention) -> torch.Tensor:
        """Attend in place of the model's attention to all rows; return [1, new, H, features]."""
        ...

    def let_go(self, slot: KeyValueSlot, num_computed: int) -> None:
        """Let rows go of which no later query sees any, between passes.

        Args:
            slot: of a sequence.
            num_computed: positions that it has computed.

        Raises:
            RuntimeError: there is no memory to move rows; the slot holds nothing any more.
        """
        ...

    def described(self) -> dict[str, Any]:
        """Return the name and the sizes."""
        ...
