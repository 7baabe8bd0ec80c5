"""Prompt lookup: what followed the longest end of prompt and answer where it occurred before."""

import torch

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft
from moeflow.policy.lookup.looked_up_text import LookedUpText


class PromptLookup:
    """Proposes from each sequence's own text."""

    name = "prompt_lookup"
    costs = False

    def __init__(self) -> None:
        self._texts: dict[str, LookedUpText] = {}

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what followed the longest match."""
        text = self._texts.setdefault(sequence.id, LookedUpText())
        text.read(sequence.tokens_from(text.num_read))
        tokens, probability = text.behind(most)
        return Draft(tuple(tokens), (probability,) * most) if tokens else NO_DRAFT

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Nothing: texts say all."""

    def forget(self, id: str) -> None:
        """Drop a sequence's text."""
        self._texts.pop(id, None)
