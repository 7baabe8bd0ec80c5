"""Room: what slots and kept tokens take of one engine's budget, and of one that it shares with experts.

Knows slots, the tree and bytes. Knows nothing of sequences.
"""

import threading
import time

from moeflow.engine.kv_cache.kept.kept_runs import Node
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.slot_sizes import SlotSizes
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.errors import BudgetError
from moeflow.offload.arena.shared_budget import KeyValueShare
from moeflow.policy.marginal_worth import kept_worth

_GROWTH = 1.5  # a slot that is full grows by this factor, where there is room
_SHARED_GROWTH = 1.0625  # where experts leave for it


class Room:
    """The bytes of slots and of what is kept.

    Of a shared budget, they are held before anything is allocated, with what copying the longest takes.

    Args:
        sizes: of slots.
        slots: those of running sequences.
        kept: what is kept of others; leaves where room is needed.
        most_bytes: of all together.
        share: of a budget that experts and other engines have a part in; None where all of it is here.

    Attributes:
        peak_bytes: the most that there were.
        growth: a slot that is full grows by this factor, where there is room.
        is_shared: whether others have a part in the budget.
        copying: another thread holds it while it copies of what is kept. So nothing that has gone is there any more
            where room is told of.
    """

    def __init__(
        self,
        sizes: SlotSizes,
        slots: dict[str, KeyValueSlot],
        kept: PrefixTree,
        most_bytes: int,
        share: KeyValueShare | None,
    ) -> None:
        self.peak_bytes = 0
        self.growth = _GROWTH if share is None else _SHARED_GROWTH
        self.is_shared = share is not None
        self.copying = threading.Lock()
        self._sizes, self._slots, self._kept = sizes, slots, kept
        self._most_bytes, self._share = most_bytes, share
        self._copied_bytes = 0 if share is None else sizes.copied_bytes  # of a position, while a slot is copied

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all together now: where the budget is shared, with as few experts as can be."""
        return self._most_bytes if self._share is None else min(self._most_bytes, self._share.most_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots of running sequences."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that may be taken beside what is kept."""
        return self.budget_bytes - self.taken()

    @property
    def growing_bytes(self) -> int:
        """Bytes that one more position of a slot takes in layers without a window."""
        return self._sizes.plain_bytes + self._copied_bytes if self._sizes.plain_bytes else 0

    def taken(self, num_bytes: int = 0, num_positions: int = 0, *, with_kept: bool = True) -> int:
        """Return the bytes that are taken once there are so many more, of a slot of so many positions."""
        taken = self.used_bytes + num_bytes + self._kept.num_bytes * with_kept
        if self._copied_bytes:
            lengths = [num_positions, self._kept.longest_run * with_kept]
            taken += self._copied_bytes * max(lengths + [slot.num_positions for slot in self._slots.values()])
        return taken

    def check_possible(self, num_positions: int) -> None:
        """Refuse a sequence that is larger than the whole budget.

        Raises:
            BudgetError: so many positions are more than the whole budget.
        """
        needed = self._sizes.bytes_of(num_positions) + self._sizes.rows(num_positions) * self._copied_bytes
        if needed <= self._most_bytes:
            return
        limit = f"kv_memory is {self._most_bytes:,} bytes"
        if self._share is not None:
            whole = self._share.budget.total_bytes
            limit = f"memory={whole:,} bytes leaves {self._most_bytes:,} to them beside the fewest experts"
        raise BudgetError(
            f"the keys and values of {num_positions:,} positions (prompt and new tokens) take {needed:,} bytes, "
            f"and {limit}. Give more, or ask for fewer new tokens."
        )

    def make(self, num_bytes: int, num_positions: int = 0, moving: Node | None = None) -> bool:
        """Let what is kept go until so many bytes are free, where there can be; return whether they are.

        Args:
            num_bytes: to be free.
            num_positions: of the slot that they are for.
            moving: a leaf that stays, since it becomes a part of the slot; None for none.
        """
        if not self.has(num_bytes, num_positions):
            return False
        there = 0 if moving is None else moving.movable_bytes
        while (missing := self.taken(num_bytes - there, num_positions) - self.budget_bytes) > 0:
            if self._kept.oldest is moving or not self.drop(missing):  # another engine has taken some meanwhile
                return False
        return True

    def hold(self, num_bytes: int, num_positions: int = 0) -> bool:
        """Let experts leave for so many bytes more, where they share the budget; return whether there is room."""
        with self.copying:
            taken = self.taken(num_bytes, num_positions)
        return self._share is None or self._share.hold(taken)

    def can_hold(self, num_bytes: int, num_positions: int) -> bool:
        """Return whether so many bytes more have room beside all that is kept, and hold them then."""
        return self.taken(num_bytes, num_positions) <= self.budget_bytes and self.hold(num_bytes, num_positions)

    def has(self, num_bytes: int, num_positions: int) -> bool:
        """Return whether so many bytes more have room once everything that is kept has gone."""
        return self.taken(num_bytes, num_positions, with_kept=False) <= self.budget_bytes

    def settle(self) -> None:
        """Note what is taken now; of a shared budget, give back what is not."""
        self.peak_bytes = max(self.peak_bytes, self.used_bytes + self._kept.num_bytes)
        with self.copying:
            taken = self.taken()
        if self._share is not None:
            self._share.hold(taken)

    def drop(self, num_bytes: int) -> bool:
        """Let something go that is kept, no more than so many bytes need; return whether there was anything."""
        return self._kept.drop(-(-num_bytes // self._sizes.plain_bytes) if self._sizes.plain_bytes else None)

    def balance(self, reused_share: float, prefill_s: float | None) -> None:
        """Let what is kept go where experts in its place would save more time; what is on its way to a disk, later.

        Args:
            reused_share: of all that was kept, the share that was used again.
            prefill_s: seconds to compute a token; None while not measured.
        """
        while self._share is not None and (leaf := self._kept.oldest) is not None:
            if leaf.written is not None and not leaf.written.is_set():
                return
            idle_s, num_tokens = time.monotonic() - leaf.used_s, len(leaf.tokens)
            worth = kept_worth(num_tokens, leaf.nbytes, idle_s=idle_s, reused_share=reused_share, prefill_s=prefill_s)
            if worth >= self._share.expert_worth():
                return
            self._kept.drop()
            del leaf
            self.settle()

    def why_none(self) -> str:
        """Return why there is no room though nothing here takes any."""
        assert self._share is not None, "a budget of its own has room"
        others = self._share.budget.key_value_bytes - self._share.num_bytes
        return (
            f"other engines on this model hold {others:,} bytes of keys and values, of memory="
            f"{self._share.budget.total_bytes:,}. Close them, or load with more memory."
        )

    def stats(self) -> dict[str, int]:
        """Return the bytes of slots and of what is kept, now and at most."""
        return {
            "kv_budget_bytes": self.budget_bytes,
            "kv_used_bytes": self.used_bytes,
            "kv_kept_bytes": self._kept.num_bytes,
            "kv_kept_tokens": self._kept.num_tokens,
            "kv_peak_bytes": self.peak_bytes,
        }

    def check_integrity(self) -> None:
        """Assert that all is inside the budget, and held."""
        total = self.used_bytes + self._kept.num_bytes
        assert total <= self.budget_bytes, f"{total} bytes are beyond the budget of {self.budget_bytes}"
        assert self._share is None or self.taken() == self._share.num_bytes, "the share has other bytes"
