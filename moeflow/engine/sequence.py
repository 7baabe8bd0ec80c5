"""A sequence on its way through the engine, and the piece of it that one step computes.

Knows token ids and counts. Knows nothing of tensors, slots or requests.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

MIN_SHARED_TOKENS = 16  # a shorter common beginning is not worth a copy


def _unscaled(length: int) -> Hashable:
    """Name the scaling of a model that has one for all lengths."""
    return None


class Images(Protocol):
    """What a prompt shows beside its tokens.

    Attributes:
        key: differs where any image differs.
    """

    key: str


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Args:
        id: its name.
        prompt_ids: its prompt, at least one token.
        max_new_tokens: most tokens it may get.
        scaling_of: names the scaling of positions in a call of a length; equal names, equal scalings.
        restart: length at which all its positions are computed anew; None for no such length.
        priority: of those that wait or run, the higher one is preferred.
        scored: whether logits of all its prompt's tokens are wanted; then it shares no other's keys and values.
        images: what its prompt shows; None for nothing.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    scaling_of: Callable[[int], Hashable] = _unscaled
    restart: int | None = None
    priority: int = 0
    scored: bool = False
    images: Images | None = None
    token_ids: list[int] = field(default_factory=list)  # the answer so far
    num_computed: int = 0  # positions whose keys and values are there
    num_cached: int | None = None  # tokens of the prompt that were copied when it began; None before
    arrival: tuple[int, int] = (0, 0)  # by which it waits, and gives way; the scheduler's
    _restarted: bool = False

    @property
    def length(self) -> int:
        """Its tokens so far, prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def image_key(self) -> str | None:
        """Tells its images from others; None where it has none."""
        return None if self.images is None else self.images.key

    @property
    def scaling(self) -> Hashable:
        """Name the scaling that its prompt's keys have: that of the call in which `generate` would compute them."""
        return self.scaling_of(self._first_length)

    @property
    def uniform_ids(self) -> list[int]:
        """Its first tokens whose keys have `scaling`: all of them, or those up to the first call of `generate`."""
        ids = self.prompt_ids + self.token_ids
        return ids if self.scaling_of(self.length) == self.scaling else ids[: self._first_length]

    @property
    def call_length(self) -> int:
        """Return the length of the call of `generate` that computes its next position, or one that scales alike."""
        length = max(self._first_length, self.num_computed + 1)
        return self.length if self.scaling_of(length) == self.scaling_of(self.length) else length

    @property
    def _first_length(self) -> int:
        """Its length in the call of `generate` that computes its first position."""
        return self.restart if self._restarted and self.restart else len(self.prompt_ids)

    def append(self, token_id: int) -> None:
        """Add a token to the answer; at the length of its restart, all is to be computed anew."""
        self.token_ids.append(token_id)
        if self.length == self.restart:
            self.num_computed, self._restarted = 0, True

    def uncomputed(self, most: int) -> list[int]:
        """Return the next tokens whose positions are not computed, at most so many, all of one call of `generate`."""
        begin, size, end = self.num_computed, len(self.prompt_ids), self.call_length
        ids = self.prompt_ids[begin:end] + self.token_ids[max(0, begin - size) : max(0, end - size)]
        return ids[:most]

    def tokens_from(self, begin: int) -> list[int]:
        """Return its tokens, prompt and answer, from a position on."""
        size = len(self.prompt_ids)
        return self.prompt_ids[begin:] + self.token_ids[max(0, begin - size) :]

    @property
    def num_positions(self) -> int:
        """Positions it may come to compute: the last new token is never computed."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def may_copy(self) -> list[int]:
        """The tokens whose keys and values it may have from others: not those of the last one."""
        return self.uniform_ids[: self.length - 1]

    @property
    def uses_kept(self) -> bool:
        """Whether all that others have left of its beginning serves it to its end."""
        return not self.scored and self.restart is None

    @property
    def begun(self) -> bool:
        """Whether any of its positions is computed."""
        return self.num_computed > 0

    @property
    def decoding(self) -> bool:
        """Whether nothing but its last new token is to be computed."""
        return bool(self.token_ids) and self.num_computed == self.length - 1


class Piece(NamedTuple):
    """New tokens of one sequence that a step computes.

    Args:
        sequence: whose tokens.
        tokens: those at positions from `sequence.num_computed` on.
        samples: whether the last token's logits choose a new token.
        draft: tokens that may follow: they are computed as well, and count as far as they are the ones chosen.
    """

    sequence: Sequence
    tokens: list[int]
    samples: bool
    draft: tuple[int, ...] = ()
