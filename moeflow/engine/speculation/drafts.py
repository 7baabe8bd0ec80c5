"""Drafts: tokens that may follow a sequence, and what proposes them."""

import math
from typing import NamedTuple, Protocol

import torch

from moeflow.engine.sequence import Sequence


class Draft(NamedTuple):
    """Tokens that may come next.

    Args:
        tokens: their ids, in their order.
        probabilities: of each, by what proposed it, that it comes if those before it do.
    """

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]


NO_DRAFT = Draft((), ())


class DraftSource(Protocol):
    """What proposes drafts. An error in any of these ends its part in the engine, and changes no answer.

    Attributes:
        name: by which `stats()` tells it.
        costs: whether a proposal takes so long that it is asked only where the others have little to say.
    """

    name: str
    costs: bool

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return at most so many tokens that may follow all tokens of a sequence."""
        ...

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Take in what a pass computed: the logits [tokens, V] behind tokens."""
        ...

    def forget(self, id: str) -> None:
        """Drop what is known of a sequence; one that is not known is no error."""
        ...


def checked(draft: Draft, most: int, vocab_size: int) -> Draft:
    """Return a draft with no more tokens than were asked for.

    Raises:
        ValueError: it has what is no token, or no probability.
    """
    tokens, probabilities = draft
    if len(tokens) != len(probabilities):
        raise ValueError(f"{len(tokens)} tokens with {len(probabilities)} probabilities")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"{token!r} is no token: the model has {vocab_size}")
    for probability in probabilities:
        if not (math.isfinite(probability) and 0 <= probability <= 1):
            raise ValueError(f"{probability!r} is no probability")
    return Draft(tuple(tokens[:most]), tuple(probabilities[:most]))
