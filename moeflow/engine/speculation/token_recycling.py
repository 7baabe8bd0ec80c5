"""Token recycling: the token that the model lately found likeliest behind each token, followed from one to the next.

Source: Luo et al. 2024, "Turning Trash into Treasure: Token Recycling". Theirs follows the eight likeliest successors
as a tree; here a draft is a chain, and each token has its likeliest one.
"""

import torch

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.drafts import Draft


class TokenRecycling:
    """Proposes chains of successors, which all sequences of an engine share. It reads each pass's logits."""

    name = "token_recycling"
    costs = False

    def __init__(self) -> None:
        self._successors: dict[int, tuple[int, float]] = {}  # of each token, and how likely it was

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return the successors of a sequence's last token, as far as they are known."""
        token = sequence.tokens_from(sequence.length - 1)[0]
        tokens: list[int] = []
        probabilities: list[float] = []
        while len(tokens) < most and token in self._successors:
            token, probability = self._successors[token]
            tokens.append(token)
            probabilities.append(probability)
        return Draft(tuple(tokens), tuple(probabilities))

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Note what was likeliest behind tokens, by logits [tokens, V]; a row without a number teaches nothing."""
        best = logits.max(-1)
        sums = (logits.float() - best.values.float()[:, None]).exp().sum(-1)
        for token, successor, total in zip(tokens, best.indices.tolist(), sums.tolist(), strict=True):
            if total >= 1:  # not NaN
                self._successors[token] = successor, 1 / total

    def forget(self, id: str) -> None:
        """Nothing is of a sequence alone."""
