"""Caches of a family's own kind: that of the running sequence, and those of conversations that may go on.

Knows sequences, tokens and bytes. Knows nothing of what lies in a cache, nor of passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeflow.engine.kv_cache.preemption import MeasuredSpeeds
from moeflow.engine.sequence import MIN_SHARED_TOKENS, Sequence
from moeflow.hf.passes.generating.generate_step import cache_bytes, can_forget, copy_cache, forget


@dataclass(eq=False)
class FamilyCache:
    """What a family keeps of one sequence.

    Args:
        cache: of its own kind; None where nothing is computed, or a pass did not end.
        num_positions: tokens that it covers, the first of its sequence.
        shifts: what the model keeps of the sequence outside of the cache, as of `ImageSteps.step`.
    """

    cache: Any = None
    num_positions: int = 0
    shifts: Any = None

    @property
    def end(self) -> int:
        """The position behind those that it covers."""
        return self.num_positions

    def take(self) -> Any:
        """Return the cache for a pass, which puts it back; one that does not end leaves none."""
        cache, self.cache = self.cache, None
        return cache


@dataclass(eq=False)
class KeptCache:
    """A cache with the tokens that it covers.

    Args:
        token_ids: all of them.
        cache: of the family's kind.
        num_bytes: of its tensors.
        forgets: whether it can go back to fewer tokens.
        branches: whether several sequences have gone on from here: then each has a copy.
        shifts: as of `FamilyCache`.
        image_key: of the images that its tokens stand for; None for none.
    """

    token_ids: list[int]
    cache: Any
    num_bytes: int
    forgets: bool
    branches: bool = False
    shifts: Any = None
    image_key: str | None = None

    def common(self, token_ids: list[int]) -> int:
        """Count the first tokens that a sequence has in common with it, the sequence's last one left out."""
        most = min(len(self.token_ids), len(token_ids) - 1)
        if self.token_ids[:most] == token_ids[:most]:
            return most
        pairs = zip(self.token_ids, token_ids, strict=False)
        return next(place for place, (own, other) in enumerate(pairs) if own != other)

    def usable(self, token_ids: list[int], image_key: str | None = None) -> int:
        """Return how many of a sequence's first tokens it can be used for: none where any image is another."""
        if image_key != self.image_key:
            return 0
        common = self.common(token_ids)
        return common if self.forgets or common == len(self.token_ids) else 0


class KeptCaches(list[KeptCache]):
    """Kept caches, the one that was used last at the end."""

    @property
    def num_tokens(self) -> int:
        """Tokens that all cover together."""
        return sum(len(one.token_ids) for one in self)


class FamilyCaches:
    """Memory of an engine that runs one sequence at a time, as a scheduler asks for it.

    What the running sequence needs is never refused, as in `generate`. What is kept stays inside the budget; the one
    that was not used for the longest time goes first.

    Args:
        budget_bytes: most bytes of all kept caches.
        is_lasting: tells of a cache whether another sequence may go on with it.

    Attributes:
        keeps: whether anything is kept of sequences that have ended.
        kept: what is kept.
        several: whether several tokens at once go on with a cache exactly; None while not tried.
        step_s: seconds of a step of one token; None while not measured.
        prefill_s: seconds for each token of a whole prompt; None while not measured.
        counts: as of an engine's other memory.
    """

    position_bytes = 0  # of any number of positions

    def __init__(self, budget_bytes: int, is_lasting: Callable[[Any], bool]) -> None:
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0
        self.keeps = True
        self.kept = KeptCaches()
        self.several: bool | None = None
        self.step_s: float | None = None
        self.prefill_s: float | None = None
        self.speeds = MeasuredSpeeds()  # of an engine's steps, which nothing here goes by
        self.refused: dict[Sequence, str] = {}
        self.counts = dict.fromkeys(("shared_tokens", "kept_hits", "preempted", "moved"), 0)
        self._is_lasting = is_lasting
        self._running: dict[str, FamilyCache] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __getitem__(self, id: str) -> FamilyCache:
        return self._running[id]

    @property
    def used_bytes(self) -> int:
        """Bytes of the running sequence."""
        return sum(cache_bytes(one.cache) for one in self._running.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(one.num_bytes for one in self.kept)

    def check_possible(self, num_positions: int) -> None:
        """Every sequence is."""

    def admit(self, sequence: Sequence) -> bool:
        """Let a sequence begin."""
        self._running[sequence.id] = FamilyCache()
        return True

    def grow(self, sequence: Sequence) -> bool:
        """A cache grows by itself, so none gives way."""
        return True

    def num_kept(self, sequence: Sequence) -> int:
        """Return how many of a sequence's first tokens are kept; 0 where computing all takes less time."""
        ids, image_key = self._ids(sequence), sequence.image_key
        count = max((one.usable(ids, image_key) for one in self.kept), default=0)
        if count and self.several is False and self.step_s is not None and self.prefill_s is not None:
            by_steps = (sequence.length - count) * self.step_s
            return count if by_steps <= sequence.length * self.prefill_s else 0
        return count

    def branch_point(self, token_ids: list[int]) -> int:
        """Return the place at which a text parts from the one that it has most in common with; 0 for none."""
        longest = max((one.common(token_ids) for one in self.kept if one.image_key is None), default=0)
        return longest if longest >= MIN_SHARED_TOKENS else 0

    def share(self, donor: Sequence | None, receiver: Sequence, num_tokens: int) -> None:
        """Let a sequence go on with the kept cache that covers so many of its tokens, or with a copy."""
        ids = self._ids(receiver)
        found = next(one for one in reversed(self.kept) if one.usable(ids, receiver.image_key) == num_tokens)
        self.kept.remove(found)
        cache = found.cache
        if found.branches:
            self.kept.append(found)
            cache = copy_cache(cache)
        elif len(found.token_ids) > num_tokens:
            forget(cache, len(found.token_ids) - num_tokens)
        self._running[receiver.id] = FamilyCache(cache, num_tokens, found.shifts)
        self.counts["shared_tokens"] += num_tokens
        self.counts["kept_hits"] += 1

    def keep(self, sequence: Sequence) -> None:
        """Keep what a sequence that has ended leaves, as far as the budget goes."""
        own = self._running.pop(sequence.id)
        if own.cache is not None:
            self._keep(self._ids(sequence)[: own.num_positions], own.cache, own.shifts, image_key=sequence.image_key)

    def keep_branch(self, token_ids: list[int], cache: Any, shifts: Any = None) -> None:
        """Keep a copy of a cache that covers these tokens of a text, from which another has gone on as well."""
        self._keep(token_ids, cache, shifts, branches=True)

    def _keep(
        self,
        token_ids: list[int],
        cache: Any,
        shifts: Any,
        *,
        branches: bool = False,
        image_key: str | None = None,
    ) -> None:
        if not self.keeps or not self._is_lasting(cache):
            return
        num_bytes = cache_bytes(cache)
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes + num_bytes)
        if num_bytes > self.budget_bytes:
            return
        self.kept[:] = [one for one in self.kept if one.token_ids != token_ids or one.image_key != image_key]
        while self.kept and self.kept_bytes + num_bytes > self.budget_bytes:
            del self.kept[0]
        if branches:
            cache = copy_cache(cache)
        # One with images goes on only as a whole: what is left then has every image in it.
        forgets = image_key is None and can_forget(cache)
        self.kept.append(KeptCache(token_ids, cache, num_bytes, forgets, branches, shifts, image_key))

    def free(self, sequence: Sequence) -> None:
        """Release what a sequence has."""
        self._running.pop(sequence.id, None)

    def clear(self) -> None:
        """Release everything."""
        self._running.clear()
        self.kept.clear()

    def stats(self) -> dict[str, int | None]:
        """Return the counts, and bytes of the running sequence and of what is kept, as an engine's other memory."""
        return {
            **self.counts,
            "kept_disk": None,
            "kv_budget_bytes": self.budget_bytes,
            "kv_used_bytes": self.used_bytes,
            "kv_kept_bytes": self.kept_bytes,
            "kv_kept_tokens": self.kept.num_tokens,
            "kv_peak_bytes": self.peak_bytes,
            "kv_position_bytes": self.position_bytes,
            "kv_positions": None,
        }

    def check_integrity(self) -> None:
        """Assert that what is kept is counted right, and inside the budget."""
        for one in self.kept:
            assert one.num_bytes == cache_bytes(one.cache), "a kept cache has grown or shrunk"
        assert self.kept_bytes <= self.budget_bytes, f"{self.kept_bytes} bytes are kept of {self.budget_bytes}"

    def _ids(self, sequence: Sequence) -> list[int]:
        return sequence.prompt_ids + sequence.token_ids
