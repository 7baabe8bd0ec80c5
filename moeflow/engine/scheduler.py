"""Scheduler: which sequences wait, which run, which give way, and which tokens of each the next step computes.

Pure bookkeeping, no tensors: a step takes one token of every sequence that decodes and fills what is left of its token
budget with pieces of prompts, in the order of admission.
Source: Sarathi-Serve (Agrawal et al. 2024, section 4: chunked prefills, stall-free batching).
"""

import bisect
import itertools
from typing import Any, Protocol

from moeflow.engine.sequence import MIN_SHARED_TOKENS, Piece, Sequence
from moeflow.errors import ConfigError, QueueFullError

STEPS_PER_PRIORITY = 100  # steps of waiting that are worth one level of priority
MAX_PRIORITY = 100  # and -100 the least


class SequenceMemory(Protocol):
    """Where keys and values lie, as a scheduler asks for it."""

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence room for its tokens; False where there is none now."""
        ...

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of a running sequence; False where there is none."""
        ...

    def preempt(self, sequence: Sequence, grower: Sequence) -> None:
        """Take the room of a sequence so that another one may grow."""
        ...

    def num_kept(self, sequence: Sequence) -> int:
        """Return how many of a sequence's first tokens others have left; 0 for too few to be copied."""
        ...

    def num_reached(self, donor: Sequence, num_tokens: int) -> int:
        """Return behind how many of a running sequence's first tokens, at most so many, another can go on."""
        ...

    def expect(self, donor: Sequence, num_tokens: int) -> None:
        """Let a running sequence keep what another needs to go on behind so many of its tokens, once they are there."""
        ...

    def share(self, donor: Sequence | None, receiver: Sequence, num_tokens: int) -> None:
        """Copy the first tokens' keys and values from a running sequence; from what others have left for None."""
        ...


class Scheduler:
    """All sequences of one engine.

    Sequences wait in the order of arrival, where one level of priority is worth `STEPS_PER_PRIORITY` steps: a sequence
    of priority p that arrives in step t waits as one of priority 0 would that arrived in step t - 100 p. So a waiting
    sequence rises by a level in 100 steps beside those that come now, and only a bounded number of steps' arrivals can
    go before it: none starves. Sequences that gave way come before all that have not begun.

    Where a running sequence cannot grow, the youngest of the lowest priority gives way, and begins again later with the
    tokens that it has. The best one never does, so that it ends.

    Args:
        max_batch_size: most sequences that run at once.
        max_step_tokens: most tokens in a step, at least max_batch_size.
        share_prefixes: whether equal beginnings of prompts are computed once.
        max_waiting: most sequences beyond max_batch_size; None for any number.

    Raises:
        ConfigError: a limit is no number that makes sense, or they do not fit each other.

    Attributes:
        running: sequences in the order of admission.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_step_tokens: int,
        *,
        share_prefixes: bool = True,
        max_waiting: int | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("max_step_tokens", max_step_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed: give a whole number, at least 1.")
        if max_step_tokens < max_batch_size:
            raise ConfigError(
                f"max_step_tokens={max_step_tokens} is less than max_batch_size={max_batch_size}: every sequence that "
                "decodes takes one token of each step. Give at least as many."
            )
        if max_waiting is not None and (type(max_waiting) is not int or max_waiting < 0):
            raise ConfigError(
                f"max_waiting={max_waiting!r} is not allowed: give a whole number, at least 0, or None for no limit."
            )
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.share_prefixes = share_prefixes
        self.max_waiting = max_waiting
        self.running: list[Sequence] = []
        self._preempted: list[Sequence] = []
        self._queue: list[Sequence] = []
        self._step = 0
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that wait, the next one first."""
        return self._preempted + self._queue

    def check_place(self) -> None:
        """Refuse one more sequence where as many are under way as may be.

        Raises:
            QueueFullError: so it is.
        """
        under_way = len(self._preempted) + len(self._queue) + len(self.running)
        if self.max_waiting is not None and under_way >= self.max_batch_size + self.max_waiting:
            raise QueueFullError(
                f"{under_way} requests are under way, and max_waiting={self.max_waiting} may wait for a place. Try "
                "again when some have ended."
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrival = self._step - STEPS_PER_PRIORITY * sequence.priority, next(self._arrivals)
        bisect.insort(self._queue, sequence, key=lambda one: one.arrival)

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, and tell whether it was running."""
        for sequences in (self.running, self._preempted, self._queue):
            if sequence in sequences:  # in none where an interrupt came before its request was reported
                sequences.remove(sequence)
                return sequences is self.running
        return False

    def plan(self, memory: SequenceMemory) -> list[Piece]:
        """Choose what the next step computes: let running sequences grow, and admit those that there is room for.

        The first sequence that finds no room lets all behind it wait as well. None is admitted in a step in which one
        gave way.

        Returns:
            The pieces, decoding sequences first; each sequence has at most one.
        """
        self._step += 1
        if self._grow(memory):
            while len(self.running) < self.max_batch_size and self._admit(memory):
                pass
        pieces = [Piece(one, [one.token_ids[-1]], True) for one in self.running if one.decoding]
        left = self.max_step_tokens - len(pieces)
        after = {one: one.num_computed for one in self.running}  # positions, once the step has ended
        for one in self.running:
            if one.decoding or not self._begin(one, after, memory, left):
                continue
            tokens = one.uncomputed(left)
            after[one] = one.num_computed + len(tokens)
            left -= len(tokens)
            pieces.append(Piece(one, tokens, after[one] == one.length))
        return pieces

    def check_integrity(self, under_way: set[Sequence], memory: Any) -> None:
        """Assert that each sequence of a request waits or runs, and that those that run have their slots."""
        assert len(self.running) == len(memory), f"{len(memory)} slots for {len(self.running)} sequences"
        for one in self.running:
            assert memory[one.id].end >= one.num_computed, f"{one.id} has another's slot"
        assert {*self.running, *self.waiting} == under_way, "a request neither waits nor runs"

    def _admit(self, memory: SequenceMemory) -> bool:
        """Let the next sequence run where there is room, and tell whether one does."""
        queue = self._preempted or self._queue
        if not queue or not memory.admit(queue[0]):
            return False
        self.running.append(queue.pop(0))
        return True

    def _grow(self, memory: SequenceMemory) -> bool:
        """Make room for every running sequence's tokens, the best one's first; False where any had to give way."""
        before = len(self.running)
        for one in sorted(self.running, key=_rank):
            while one in self.running and not memory.grow(one):
                worst = max(self.running, key=_rank)
                memory.preempt(worst, one)
                self.running.remove(worst)
                worst.num_computed = 0
                self._preempted.insert(0, worst)
        return len(self.running) == before

    def _begin(self, sequence: Sequence, after: dict[Sequence, int], memory: SequenceMemory, left: int) -> bool:
        """Copy the longest known beginning into a sequence that has none; False where it waits, for tokens or for one.

        Args:
            sequence: which.
            after: positions of each running sequence, once the step has ended.
            memory: where they lie.
            left: tokens that the step still takes.
        """
        if not sequence.begun and self.share_prefixes and not sequence.scored:
            donor, shared = self._longest(sequence, after, memory)
            if donor is not None and donor.num_computed < shared < after[donor]:
                memory.expect(donor, shared)
            if not left:
                return False
            kept = memory.num_kept(sequence)
            if kept >= shared:
                donor, shared = None, kept
            if donor is not None and shared > donor.num_computed:
                return False  # a step later all of it is there
            if shared:
                memory.share(donor, sequence, shared)
                sequence.num_computed = shared
        if not left:
            return False
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _longest(
        self, sequence: Sequence, after: dict[Sequence, int], memory: SequenceMemory
    ) -> tuple[Sequence | None, int]:
        """Find the running sequence that has, or has after this step, most of this prompt's beginning.

        The prompt's last token is never shared, nor are keys of another scaling; too few tokens count as none.
        """
        best, longest = None, MIN_SHARED_TOKENS - 1
        prompt, scaling = sequence.prompt_ids[:-1], sequence.scaling
        for other, computed in after.items():
            limit = min(computed, len(prompt), len(other.prompt_ids)) if other.scaling == scaling else 0
            if limit > longest and other.prompt_ids[: longest + 1] == prompt[: longest + 1]:
                count = _common(other.prompt_ids, prompt, limit)
                if count <= other.num_computed:
                    count = memory.num_reached(other, count)
                if count > longest:
                    best, longest = other, count
        return best, longest if best is not None else 0


def check_priority(priority: int) -> None:
    """Refuse what is no priority.

    Raises:
        ConfigError: it is no whole number from -100 to 100.
    """
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        raise ConfigError(
            f"priority={priority!r} is not allowed: give a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}, "
            "the higher the sooner."
        )


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Order running sequences: the higher priority first, then who came first."""
    return -sequence.priority, sequence.arrival[1]


def _common(one: list[int], other: list[int], limit: int) -> int:
    """Count the equal tokens at the beginning, at most `limit`."""
    if one[:limit] == other[:limit]:
        return limit
    return next(place for place in range(limit) if one[place] != other[place])
