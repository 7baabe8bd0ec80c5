"""Memory of keys and values: slots of running sequences and the tree of kept ones, in one budget.

Knows sequences, slots and the tree. Knows nothing of models or of who waits.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeflow.engine.kv_cache.disk.kept_disk import DiskMaker, KeptDisk, check_keeps
from moeflow.engine.kv_cache.host_moves import HostMoves
from moeflow.engine.kv_cache.kept import prefix_files
from moeflow.engine.kv_cache.kept.moving import moved_slot
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy
from moeflow.engine.kv_cache.room import Room
from moeflow.engine.kv_cache.slot_sizes import SlotSizes, roomy
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sequence import MIN_SHARED_TOKENS, Sequence
from moeflow.offload.arena.shared_budget import KeyValueShare


class KeyValueMemory:
    """The slots of running sequences, and what is kept of others, inside one budget.

    A slot begins with room for its sequence's tokens and a few more, and grows with it; layers with a window move on.
    What is kept leaves where a slot needs its room.

    Args:
        layout: the layers that keep keys and values, by their number.
        budget_bytes: most bytes of all together.
        max_positions: most positions of all together, beyond which a budget is of no use; None for no limit.
        moves: whether a sequence that gives way may move to host memory; None: where keys lie on a GPU.
        most_kept_bytes: most bytes of what is kept; None for what the budget leaves.
        most_new: most tokens of one sequence in one pass; None for no limit, and for windows that do not move.
        share: of a budget that experts and others' keys and values have a part in; None where all of it is here. Before
            anything is allocated, the share has it.
        policy: which rows of slots are let go; None for none.

    Attributes:
        position_bytes: of one position in all layers.
        keeps: whether anything is kept of sequences that have ended or given way.
        kept: what is kept.
        disk: where kept prefixes also lie; None where they leave for good.
        speeds: by which moving is weighed against computing again.
        refused: sequences for which the machine has no memory though nothing else takes any, with the reason.
        counts: {"shared_tokens": copied from running or kept sequences, "kept_hits": beginnings that were kept,
            "preempted": sequences that gave way, "moved": those of them that went to host memory}.
    """

    def __init__(
        self,
        layout: dict[int, LayerShape],
        budget_bytes: int,
        max_positions: int | None = None,
        *,
        moves: bool | None = None,
        most_kept_bytes: int | None = None,
        most_new: int | None = None,
        share: KeyValueShare | None = None,
        policy: KeyValuePolicy | None = None,
    ) -> None:
        assert policy is None or most_new is not None, "a policy needs to know how many tokens a pass has"
        self.sizes = SlotSizes(layout, most_new, None if policy is None else policy.most_rows(most_new or 0))
        self.position_bytes = self.sizes.plain_bytes + self.sizes.window_bytes
        if max_positions is not None:
            budget_bytes = min(budget_bytes, max_positions * self.position_bytes)
        self._num_offered = 0  # times that a sequence's tokens were kept
        self.keeps = True
        self.kept = PrefixTree(self.sizes.window)
        self.refused: dict[Sequence, str] = {}
        self.counts = dict.fromkeys(("shared_tokens", "kept_hits", "preempted", "moved"), 0)
        self._most_kept_bytes = budget_bytes if most_kept_bytes is None else most_kept_bytes
        self._layout = self.sizes.layout
        self._slots: dict[str, KeyValueSlot] = {}
        self._room = Room(self.sizes, self._slots, self.kept, budget_bytes, share)
        self._policy = policy
        self._moved = HostMoves(self.sizes, False if policy is not None and policy.forgets else moves)
        self.speeds = self._moved.speeds
        self.disk: KeptDisk | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, id: str) -> KeyValueSlot:
        return self._slots[id]

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all together now."""
        return self._room.budget_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that there were."""
        return self._room.peak_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots of running sequences."""
        return self._room.used_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept of other sequences."""
        return self.kept.num_bytes

    @property
    def _reused_share(self) -> float:
        """Of all that was kept, the share that was used again; a half where nothing is known."""
        return min(1.0, (self.counts["kept_hits"] + 1) / (self._num_offered + 2))

    def check_possible(self, num_positions: int) -> None:
        """Refuse a sequence that is larger than the whole budget.

        Raises:
            BudgetError: so many positions are more than the whole budget.
        """
        self._room.check_possible(num_positions)

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence its slot, with what of it lies in host memory; return whether there was room."""
        assert sequence.id not in self._slots, f"{sequence.id} has a slot"
        self.num_kept(sequence)  # what it will copy leaves last
        num_positions = roomy(sequence)
        num_rows = self.sizes.rows(num_positions)
        needed = self.sizes.bytes_of(num_positions), num_rows
        own = sequence.uses_kept and self.keeps and sequence.id not in self._moved.ids()
        known = sequence.scaling, sequence.may_copy
        if own and self.disk is not None:
            self.disk.bring_back(sequence, *known, needed, self.speeds)
        if own and (moved := moved_slot(*known, self.kept, self._room, self._layout, *needed)) is not None:
            slot, sequence.num_computed = moved
            self._begin(sequence, slot)
            self.counts["kept_hits"] += 1
            self.counts["shared_tokens"] += sequence.num_computed
            return True
        while self._room.make(*needed) and self._room.hold(*needed):
            try:
                slot = KeyValueSlot.empty(self._layout, num_rows)
            except RuntimeError as error:  # there is less memory than the budget allows
                if self.kept.drop():
                    continue
                self._room.settle()
                if not self._slots:
                    self.refused[sequence] = f"no memory for keys and values: {error}"
                return False
            self._begin(sequence, slot)
            self._moved.bring_back(sequence, slot)
            return True
        self._room.settle()
        if self._room.is_shared and not self._slots:  # nothing here will make room
            self.refused[sequence] = self._room.why_none()
        return False

    def _begin(self, sequence: Sequence, slot: KeyValueSlot) -> None:
        self._slots[sequence.id] = slot
        self._room.settle()
        if self.keeps:
            slot.marks.add(len(sequence.prompt_ids))  # the next turn may leave out some of the answer
        if self.disk is not None:
            self.disk.write_ahead()

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of a running sequence, and more where there is any; return whether there was.

        In layers with a window, for those that the next pass computes, behind the window before them.
        """
        self._room.balance(self._reused_share, self.speeds.prefill_s)
        slot = self._slots[sequence.id]
        if self._policy is not None:
            try:
                self._policy.let_go(slot, sequence.num_computed)
            except RuntimeError:  # there is no memory to move rows: all is computed again
                sequence.num_computed = 0
                self._policy.let_go(slot, 0)
        ways = (False, True) if self.sizes.window else (False,)  # in the second way without what others may need
        has_room = any(self._move_window(sequence, slot, one) and self._grow_plain(sequence, slot) for one in ways)
        if has_room:
            self.refused.pop(sequence, None)  # where it was only in the first way
        return has_room

    def preempt(self, sequence: Sequence, grower: Sequence) -> None:
        """Take a sequence's slot so that another may grow: keep what there is room for, or move it to host memory.

        Args:
            sequence: the one that gives way.
            grower: the one that needs room; may be the same.
        """
        slot = self._slots.pop(sequence.id)
        self.counts["preempted"] += 1
        needed = 0 if grower is sequence else self.sizes.bytes_of(roomy(grower)) - self._slots[grower.id].nbytes
        room = max(0, self._room.free_bytes - max(0, needed))
        count = self.sizes.num_fitting(sequence, slot, room)
        if count < sequence.num_computed and self._moved.take(sequence, slot):
            self.counts["moved"] += 1
        else:
            self._keep(sequence, slot, count)
        del slot
        self._room.settle()

    def keep(self, sequence: Sequence) -> None:
        """Take the slot of a sequence that has ended, and keep what it has computed."""
        slot = self._slots.pop(sequence.id, None)
        if slot is not None:  # not where an interrupt came in the middle of a step
            self._keep(sequence, slot, sequence.num_computed)
            del slot
            self._room.settle()
            self._room.balance(self._reused_share, self.speeds.prefill_s)

    def free(self, sequence: Sequence) -> None:
        """Release what a sequence has: its slot, or what lies in host memory; none of what is kept for others."""
        self._slots.pop(sequence.id, None)
        self._moved.forget(sequence.id)
        self.refused.pop(sequence, None)
        self._room.settle()

    def num_kept(self, sequence: Sequence) -> int:
        """Return how many of a sequence's first tokens are kept, without its last one; 0 for too few to be copied."""
        tokens = sequence.may_copy
        count, slot = self.kept.longest(sequence.scaling, tokens), self._slots.get(sequence.id)
        if slot is not None and self.keeps:
            common = self.kept.common(sequence.scaling, tokens)
            if common > count:
                slot.marks.add(common)  # a place where prompts part: the next one shall go on there
        return count if count >= MIN_SHARED_TOKENS else 0

    def num_reached(self, donor: Sequence, num_tokens: int) -> int:
        """Return behind how many of a running sequence's first tokens, at most so many, another can go on."""
        return self._slots[donor.id].last_place(donor.num_computed, num_tokens)

    def expect(self, donor: Sequence, num_tokens: int) -> None:
        """Let a running sequence keep what another needs to go on behind so many of its tokens, once they are there."""
        self._slots[donor.id].marks.add(num_tokens)

    def share(self, donor: Sequence | None, receiver: Sequence, num_tokens: int) -> None:
        """Copy the first tokens' keys and values, as many as can be, from a running sequence or from what is kept."""
        slot = self._slots[receiver.id]
        if donor is None:
            self.kept.copy(receiver.scaling, receiver.may_copy[:num_tokens], slot)
            self.counts["kept_hits"] += 1
        else:
            slot.copy_from(self._slots[donor.id], num_tokens)
            slot.place_window(self._slots[donor.id].window_parts(donor.num_computed), num_tokens)
        self.counts["shared_tokens"] += num_tokens

    def save(self, folder: Path, fingerprint: str) -> int:
        """Write what is kept to a model's files, and return its number of tokens; see `prefix_files.save`."""
        return prefix_files.save(self.kept, folder, fingerprint)

    def load(self, folder: Path, fingerprint: str) -> int:
        """Keep what was saved of a model, as far as there is room; return the number of tokens."""
        return prefix_files.load_into(self.kept, self._room, folder, fingerprint, self._layout) if self.keeps else 0

    def keep_on_disk(self, make_disk: DiskMaker) -> None:
        """Let what is kept go to a disk before it leaves; ConfigError where nothing is."""
        check_keeps(self.keeps, None if self._policy is None or not self._policy.forgets else self._policy.name)
        self.disk = make_disk(self.kept, self._room, self._layout, self._most_kept_bytes)

    def clear(self) -> None:
        """Release everything, for good where there is a disk: its files stay."""
        self._slots.clear()
        self._moved.clear()
        self.refused.clear()
        self.kept.clear()
        self._room.settle()
        if self.disk is not None:
            self.disk.close()

    def stats(self) -> dict[str, Any]:
        """Return the counts, and bytes of slots and of what is kept."""
        return {
            **self.counts,
            "kept_disk": None if self.disk is None else self.disk.stats(),
            **self._room.stats(),
            "kv_position_bytes": self.position_bytes,
            "kv_positions": self.sizes.most_positions(self.budget_bytes),
        }

    def check_integrity(self) -> None:
        """Assert that all is counted with its bytes, and inside the budget."""
        for id, slot in self._slots.items():
            assert slot.nbytes >= slot.num_positions * self.sizes.record_bytes, f"the slot of {id} is too small"
        self.kept.check_integrity(self.sizes.record_bytes)
        self._room.check_integrity()
        assert not self._moved.ids() & self._slots.keys(), "a sequence that runs lies in host memory as well"

    def _keep(self, sequence: Sequence, slot: KeyValueSlot, num_positions: int) -> None:
        if not self.keeps or num_positions < MIN_SHARED_TOKENS:
            return
        tokens = sequence.uniform_ids[:num_positions]
        if self._room.is_shared:
            copied = slot.nbytes + self.kept.copied_bytes(sequence.scaling, tokens, slot), slot.num_positions
            if not (self._room.make(*copied) and self._room.hold(*copied)):
                return
        with suppress(RuntimeError):  # there is less memory than the budget allows: it is computed again
            self.kept.keep(sequence.scaling, tokens, slot)
            self._num_offered += 1
        while (surplus := max(self.kept_bytes - self._most_kept_bytes, -self._room.free_bytes)) > 0:
            self._room.drop(surplus)
        if self.disk is not None:
            self.disk.write_ahead()

    def _move_window(self, sequence: Sequence, slot: KeyValueSlot, sparing: bool) -> bool:
        """Let layers with a window have room for the next pass, behind what it sees; return whether there was memory.

        Sparing, they hold no more than that, for no other sequence either.
        """
        move = self.sizes.next_window(sequence, slot, sparing=sparing)
        if move is None:
            return True
        more = move.num_bytes
        if self._room.is_shared:  # what is set aside is copied first
            more = max(0, more) + self.sizes.window_bytes * sum(end - begin for begin, end in move.aside)
        if more > 0 and not (self._room.make(more) and self._room.hold(more)):
            return False
        return self._is_done(sequence, lambda: slot.move_window(move.aside, move.room, sequence.num_computed))

    def _grow_plain(self, sequence: Sequence, slot: KeyValueSlot) -> bool:
        """Make room for all tokens of a sequence in layers without a window; return whether there was memory."""
        has, forgotten = slot.num_positions, slot.forgotten
        needed, least = self.sizes.next_end(sequence) - forgotten, self.sizes.rows(roomy(sequence) - forgotten)
        if has >= needed:
            return True
        of_position = self.sizes.plain_bytes
        self._room.make(min((least - has) * of_position, self._room.free_bytes + self.kept_bytes), least)
        most = self.sizes.rows(sequence.num_positions - forgotten)
        num_positions = min(most, max(least, int(sequence.length * self._room.growth)))
        if self._room.growing_bytes:
            num_positions = min(num_positions, has + self._room.free_bytes // self._room.growing_bytes)
        if num_positions < needed or not self._room.hold((num_positions - has) * of_position, num_positions):
            return False
        return self._is_done(sequence, lambda: slot.grow(num_positions, sequence.num_computed - forgotten))

    def _is_done(self, sequence: Sequence, make_larger: Callable[[], None]) -> bool:
        """Let a slot take memory, in place of what is kept where there is no other; return whether it could."""
        while True:
            try:
                make_larger()
            except RuntimeError as error:
                if self.kept.drop():
                    continue
                self._room.settle()
                if len(self._slots) == 1:
                    self.refused[sequence] = f"no memory for keys and values: {error}"
                return False
            self._room.settle()
            return True
