"""Scheduler: which sequences wait, which run, and which tokens of each the next step computes.

Pure bookkeeping, no tensors: a step takes one token of every sequence that decodes and fills what is left of its token
budget with pieces of prompts, in the order of arrival.
Source: Sarathi-Serve (Agrawal et al. 2024, section 4: chunked prefills, stall-free batching).
"""

import itertools
from collections import deque
from collections.abc import Callable

from moeflow.engine.sequence import Piece, Sequence
from moeflow.errors import ConfigError

_MIN_SHARED_TOKENS = 16  # a shorter common beginning is not worth a copy


class Scheduler:
    """All sequences of one engine.

    Args:
        max_batch_size: most sequences that run at once.
        max_step_tokens: most tokens in a step, at least max_batch_size.
        share_prefixes: whether equal beginnings of prompts are computed once.

    Raises:
        ConfigError: a limit is no positive number, or they do not fit each other.

    Attributes:
        waiting, running: sequences in the order of arrival, and of admission.
    """

    def __init__(self, max_batch_size: int, max_step_tokens: int, *, share_prefixes: bool = True) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("max_step_tokens", max_step_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed: give a whole number, at least 1.")
        if max_step_tokens < max_batch_size:
            raise ConfigError(
                f"max_step_tokens={max_step_tokens} is less than max_batch_size={max_batch_size}: every sequence that "
                "decodes takes one token of each step. Give at least as many."
            )
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.share_prefixes = share_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, and tell whether it was running."""
        if sequence in self.running:
            self.running.remove(sequence)
            return True
        if sequence in self.waiting:  # not where an interrupt came before its request was reported
            self.waiting.remove(sequence)
        return False

    def wants(self, ended: Sequence) -> bool:
        """Tell whether a sequence that begins soon could share the prompt of one that has ended."""
        if not self.share_prefixes:
            return False
        soon = [*itertools.islice(self.waiting, self.max_batch_size), *(one for one in self.running if not one.begun)]
        return any(
            min(len(ended.prompt_ids), len(one.prompt_ids) - 1) >= _MIN_SHARED_TOKENS
            and ended.prompt_ids[:_MIN_SHARED_TOKENS] == one.prompt_ids[:_MIN_SHARED_TOKENS]
            and ended.scaling == one.scaling
            for one in soon
        )

    def plan(
        self,
        admit: Callable[[Sequence], bool],
        share: Callable[[Sequence, Sequence, int], None],
        donors: Callable[[], list[Sequence]] = list,
    ) -> list[Piece]:
        """Choose what the next step computes, and admit the sequences that there is room for.

        Args:
            admit: takes a slot for a sequence; False where there is none now. The first that gets none lets all
                behind it wait as well.
            share: (donor, receiver, num_tokens) copies the keys and values of a common beginning.
            donors: returns ended sequences whose keys and values are still there, once admission is over.

        Returns:
            The pieces, decoding sequences first; each sequence has at most one.
        """
        while self.waiting and len(self.running) < self.max_batch_size and admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        pieces = [Piece(one, [one.token_ids[-1]], True) for one in self.running if one.decoding]
        left = self.max_step_tokens - len(pieces)
        after = {one: one.num_computed for one in [*self.running, *donors()]}  # positions, once the step has ended
        for one in self.running:
            if one.decoding or not left:
                continue
            if not one.begun and self.share_prefixes and not one.scored:
                donor, shared = self._longest(one, after)
                if donor is not None and shared > donor.num_computed:
                    continue  # a step later all of it is there
                if donor is not None:
                    share(donor, one, shared)
                    one.num_computed = shared
            tokens = one.uncomputed(left)
            after[one] = one.num_computed + len(tokens)
            left -= len(tokens)
            pieces.append(Piece(one, tokens, after[one] == one.length))
        return pieces

    def _longest(self, sequence: Sequence, after: dict[Sequence, int]) -> tuple[Sequence | None, int]:
        """Find the sequence that has, or has after this step, most of this prompt's beginning.

        The prompt's last token is never shared, nor are keys of another scaling.
        """
        best, longest = None, _MIN_SHARED_TOKENS - 1
        prompt, scaling = sequence.prompt_ids[:-1], sequence.scaling
        for other, computed in after.items():
            limit = min(computed, len(prompt), len(other.prompt_ids)) if other.scaling == scaling else 0
            if limit > longest and other.prompt_ids[: longest + 1] == prompt[: longest + 1]:
                best, longest = other, _common(other.prompt_ids, prompt, limit)
        return best, longest


def _common(one: list[int], other: list[int], limit: int) -> int:
    """Count the equal tokens at the beginning, at most `limit`."""
    return next((place for place in range(limit) if one[place] != other[place]), limit)
