"""Memory of keys and values: slots of running sequences and the tree of kept ones, in one budget.

Knows sequences, slots and the tree. Knows nothing of models or of who waits.
"""

import time
from pathlib import Path

import torch

from moeflow.engine.kv_cache import prefix_files
from moeflow.engine.kv_cache.preemption import MeasuredSpeeds
from moeflow.engine.kv_cache.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.slots import KeyValueSlot, LayerShape
from moeflow.engine.sequence import MIN_SHARED_TOKENS, Sequence
from moeflow.errors import BudgetError
from moeflow.hardware import available_memory_bytes, memory_limit_bytes
from moeflow.memory_size import MemorySize, parse_kv_memory

_KEPT_SHARE = 16  # of the memory that the process may use
_AUTO_BYTES = 2 << 30  # kv_memory="auto" takes no more where nothing was planned
_SPARE_POSITIONS = 64  # that a slot has beyond its sequence's tokens, where there is room
_GROWTH = 1.5  # a slot that is full grows by this factor, where there is room


def most_kept(kv_memory: MemorySize, model: object) -> int | None:
    """Return the most bytes of what is kept of ended sequences; None for what the budget leaves.

    In host memory, where experts want every byte, "auto" keeps no more than a sixteenth of what the process may use.
    """
    planned = getattr(getattr(model, "moeflow", None), "plan", None)
    return None if kv_memory != "auto" or planned else memory_limit_bytes() // _KEPT_SHARE


def kv_budget(kv_memory: MemorySize, model: object) -> int:
    """Return the bytes that all keys and values may take.

    Args:
        kv_memory: the option; for "auto", what was kept for them when the model was loaded, else 2 GiB.
        model: whose keys and values.

    Raises:
        ConfigError: it is no size.
    """
    if kv_memory != "auto":
        return parse_kv_memory(kv_memory)
    plan = getattr(getattr(model, "moeflow", None), "plan", None) or {}
    return int(plan.get("key_value_bytes", _AUTO_BYTES))


class KeyValueMemory:
    """The slots of running sequences, and what is kept of others, inside one budget.

    A slot begins with room for its sequence's tokens and a few more, and grows with it. What is kept leaves where a
    slot needs its room.

    Args:
        layout: the layers that keep keys and values, by their number.
        budget_bytes: most bytes of all together.
        max_positions: most positions of all together, beyond which a budget is of no use; None for no limit.
        moves: whether a sequence that gives way may move to host memory; None: where keys lie on a GPU.
        most_kept_bytes: most bytes of what is kept; None for what the budget leaves.

    Attributes:
        keeps: whether anything is kept of sequences that have ended or given way.
        kept: what is kept.
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
    ) -> None:
        self.position_bytes = sum(shape.position_bytes for shape in layout.values())
        if max_positions is not None:
            budget_bytes = min(budget_bytes, max_positions * self.position_bytes)
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0
        self.keeps = True
        self.kept = PrefixTree()
        self.speeds = MeasuredSpeeds()
        self.refused: dict[Sequence, str] = {}
        self.counts = dict.fromkeys(("shared_tokens", "kept_hits", "preempted", "moved"), 0)
        self._most_kept_bytes = budget_bytes if most_kept_bytes is None else most_kept_bytes
        self._layout = layout
        self._moves = any(shape.device.type != "cpu" for shape in layout.values()) if moves is None else moves
        self._slots: dict[str, KeyValueSlot] = {}
        self._moved: dict[str, KeyValueSlot] = {}  # in host memory, of sequences that gave way

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, id: str) -> KeyValueSlot:
        return self._slots[id]

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots of running sequences."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept of other sequences."""
        return self.kept.num_tokens * self.position_bytes

    def check_possible(self, num_positions: int) -> None:
        """Refuse a sequence that is larger than the whole budget.

        Raises:
            BudgetError: so many positions are more than the whole budget.
        """
        needed = num_positions * self.position_bytes
        if needed > self.budget_bytes:
            raise BudgetError(
                f"the keys and values of {num_positions:,} positions (prompt and new tokens) take {needed:,} bytes, "
                f"and kv_memory is {self.budget_bytes:,} bytes. Give more, or ask for fewer new tokens."
            )

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence its slot, with what of it lies in host memory; return whether there was room."""
        assert sequence.id not in self._slots, f"{sequence.id} has a slot"
        self.num_kept(sequence)  # what it will copy leaves last
        num_positions = _roomy(sequence)
        while self._make_room(num_positions):
            try:
                slot = self._slots[sequence.id] = KeyValueSlot.empty(self._layout, num_positions)
            except RuntimeError as error:  # there is less memory than the budget allows
                if self.kept.drop():
                    continue
                if not self._slots:
                    self.refused[sequence] = f"no memory for keys and values: {error}"
                return False
            self._note_peak()
            moved = self._moved.pop(sequence.id, None)
            if moved is not None:
                self._copy_timed(slot, moved)
                sequence.num_computed = moved.num_positions
            return True
        return False

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of a running sequence, and more where there is any; return whether there was."""
        slot = self._slots[sequence.id]
        if slot.num_positions >= sequence.length:
            return True
        has, least = slot.num_positions, _roomy(sequence)
        self._make_room(min(least - has, self._free_positions() + self.kept.num_tokens))
        most = min(sequence.num_positions, max(least, int(sequence.length * _GROWTH)))
        num_positions = min(most, has + self._free_positions())
        if num_positions < sequence.length:
            return False
        while True:
            try:
                slot.grow(num_positions, sequence.num_computed)
            except RuntimeError as error:
                if self.kept.drop():
                    continue
                if len(self._slots) == 1:
                    self.refused[sequence] = f"no memory for keys and values: {error}"
                return False
            self._note_peak()
            return True

    def preempt(self, sequence: Sequence, grower: Sequence) -> None:
        """Take a sequence's slot so that another may grow: keep what there is room for, or move it to host memory.

        Args:
            sequence: the one that gives way.
            grower: the one that needs room; may be the same.
        """
        slot = self._slots.pop(sequence.id)
        self.counts["preempted"] += 1
        needed = 0 if grower is sequence else _roomy(grower) - self._slots[grower.id].num_positions
        room = max(0, self._free_positions() - needed)
        if room < sequence.num_computed and self._move(sequence, slot):
            return
        self._keep(sequence, slot, min(sequence.num_computed, room))

    def keep(self, sequence: Sequence) -> None:
        """Take the slot of a sequence that has ended, and keep what it has computed."""
        slot = self._slots.pop(sequence.id, None)
        if slot is not None:  # not where an interrupt came in the middle of a step
            self._keep(sequence, slot, sequence.num_computed)

    def free(self, sequence: Sequence) -> None:
        """Release what a sequence has: its slot, or what lies in host memory; none of what is kept for others."""
        self._slots.pop(sequence.id, None)
        self._moved.pop(sequence.id, None)
        self.refused.pop(sequence, None)

    def num_kept(self, sequence: Sequence) -> int:
        """Return how many of a sequence's first tokens are kept, without its last one; 0 for too few to be copied."""
        count = self.kept.longest(sequence.scaling, _may_copy(sequence))
        return count if count >= MIN_SHARED_TOKENS else 0

    def share(self, donor: Sequence | None, receiver: Sequence, num_tokens: int) -> None:
        """Copy the first tokens' keys and values from a running sequence, or from what is kept."""
        slot = self._slots[receiver.id]
        if donor is None:
            self.kept.copy(receiver.scaling, _may_copy(receiver)[:num_tokens], slot)
            self.counts["kept_hits"] += 1
        else:
            slot.copy_from(self._slots[donor.id], num_tokens)
        self.counts["shared_tokens"] += num_tokens

    def save(self, folder: Path, fingerprint: str) -> int:
        """Write what is kept to a model's files, and return its number of tokens; see `prefix_files.save`."""
        return prefix_files.save(self.kept, folder, fingerprint)

    def load(self, folder: Path, fingerprint: str) -> int:
        """Keep what was saved of a model, as far as there is room; return the number of tokens."""
        before = self.kept.num_tokens
        if self.keeps:
            for run in prefix_files.load(folder, fingerprint, self._layout):
                if self._free_positions() >= len(run.tokens):
                    self.kept.restore(run)
            self._note_peak()
        return self.kept.num_tokens - before

    def clear(self) -> None:
        """Release everything."""
        self._slots.clear()
        self._moved.clear()
        self.refused.clear()
        self.kept.clear()

    def stats(self) -> dict[str, int]:
        """Return the counts, and bytes of slots and of what is kept."""
        return {
            **self.counts,
            "kv_budget_bytes": self.budget_bytes,
            "kv_used_bytes": self.used_bytes,
            "kv_kept_bytes": self.kept_bytes,
            "kv_kept_tokens": self.kept.num_tokens,
            "kv_peak_bytes": self.peak_bytes,
            "kv_position_bytes": self.position_bytes,
        }

    def check_integrity(self) -> None:
        """Assert that all is counted with its bytes, and inside the budget."""
        for id, slot in self._slots.items():
            assert slot.nbytes >= slot.num_positions * self.position_bytes, f"the slot of {id} is too small"
        self.kept.check_integrity(self.position_bytes)
        total = self.used_bytes + self.kept_bytes
        assert total <= self.budget_bytes, f"{total} bytes are beyond the budget of {self.budget_bytes}"
        assert not self._moved.keys() & self._slots.keys(), "a sequence that runs lies in host memory as well"

    def _keep(self, sequence: Sequence, slot: KeyValueSlot, num_positions: int) -> None:
        if not self.keeps or num_positions < MIN_SHARED_TOKENS:
            return
        try:
            self.kept.keep(sequence.scaling, sequence.uniform_ids[:num_positions], slot)
        except RuntimeError:  # there is less memory than the budget allows: it is computed again
            return
        self._note_peak()
        while (surplus := self.kept_bytes - self._most_kept_bytes) > 0:
            self.kept.drop(-(-surplus // self.position_bytes))

    def _move(self, sequence: Sequence, slot: KeyValueSlot) -> bool:
        """Move what a sequence has computed to host memory, where that pays; return whether it did."""
        count = sequence.num_computed
        num_bytes = count * self.position_bytes
        if not self._moves or not self.speeds.favour_copy(count, num_bytes, available_memory_bytes() // 2):
            return False
        try:
            host = {layer: shape._replace(device=torch.device("cpu")) for layer, shape in self._layout.items()}
            moved = KeyValueSlot.empty(host, count)
        except RuntimeError:
            return False
        self._copy_timed(moved, slot)
        self._moved[sequence.id] = moved
        self.counts["moved"] += 1
        return True

    def _copy_timed(self, target: KeyValueSlot, source: KeyValueSlot) -> None:
        begin, count = time.perf_counter(), min(target.num_positions, source.num_positions)
        target.copy_from(source, count)
        for device in {tensor.device for tensor in target.keys.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        self.speeds.saw_copy(count * self.position_bytes, time.perf_counter() - begin)

    def _make_room(self, num_positions: int) -> bool:
        """Let what is kept go until so many positions are free, where there can be; return whether they are."""
        if self._free_positions() + self.kept.num_tokens < num_positions:
            return False
        while (missing := num_positions - self._free_positions()) > 0:
            self.kept.drop(missing)
        return True

    def _free_positions(self) -> int:
        return (self.budget_bytes - self.used_bytes - self.kept_bytes) // self.position_bytes

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.used_bytes + self.kept_bytes)


def _roomy(sequence: Sequence) -> int:
    """Return the positions of a slot that holds a sequence's tokens and a few more."""
    return min(sequence.num_positions, sequence.length + _SPARE_POSITIONS)


def _may_copy(sequence: Sequence) -> list[int]:
    """Return the tokens whose keys and values a sequence may have from others: not those of the last one."""
    return sequence.uniform_ids[: sequence.length - 1]
