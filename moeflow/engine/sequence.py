"""A sequence on its way through the engine, and the piece of it that one step computes.

Knows token ids and counts. Knows nothing of tensors, slots or requests.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple


def _unscaled(length: int) -> Hashable:
    """Name the scaling of a model that has one for all lengths."""
    return None


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Args:
        id: its name.
        prompt_ids: its prompt, at least one token.
        max_new_tokens: most tokens it may get.
        scaling_of: names the scaling of positions in a call of a length; equal names, equal scalings.
        restart: length at which all its positions are computed anew; None for no such length.
        scored: whether logits of all its prompt's tokens are wanted; then it shares no other's keys and values.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    scaling_of: Callable[[int], Hashable] = _unscaled
    restart: int | None = None
    scored: bool = False
    token_ids: list[int] = field(default_factory=list)  # the answer so far
    num_computed: int = 0  # positions whose keys and values are there
    _restarted: bool = False

    @property
    def length(self) -> int:
        """Its tokens so far, prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def scaling(self) -> Hashable:
        """Name the scaling that its prompt's keys have: that of the call in which `generate` would compute them."""
        return self.scaling_of(self.restart if self._restarted and self.restart else len(self.prompt_ids))

    def append(self, token_id: int) -> None:
        """Add a token to the answer; at the length of its restart, all is to be computed anew."""
        self.token_ids.append(token_id)
        if self.length == self.restart:
            self.num_computed, self._restarted = 0, True

    def uncomputed(self, most: int) -> list[int]:
        """Return the next tokens whose positions are not computed, at most so many."""
        begin, size = self.num_computed, len(self.prompt_ids)
        return (self.prompt_ids[begin:] + self.token_ids[max(0, begin - size) :])[:most]

    @property
    def num_positions(self) -> int:
        """Positions it may come to compute: the last new token is never computed."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

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
    """

    sequence: Sequence
    tokens: list[int]
    samples: bool
