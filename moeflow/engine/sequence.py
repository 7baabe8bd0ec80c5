"""A sequence on its way through the engine, and the piece of it that one step computes.

Knows token ids and counts. Knows nothing of tensors, slots or requests.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Args:
        id: its name.
        prompt_ids: its prompt, at least one token.
        max_new_tokens: most tokens it may get.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)  # the answer so far
    num_computed: int = 0  # positions whose keys and values are there

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
        """Whether its prompt is done."""
        return self.num_computed >= len(self.prompt_ids)


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
