"""Prompt lookup: what followed the longest end of prompt and answer where it occurred before.

Source: Saxena 2023, "Prompt Lookup Decoding"; with any length of match, as in "SAM Decoding" (Hu et al. 2024).
"""

import torch

from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.drafts import NO_DRAFT, Draft
from moeflow.engine.speculation.suffix_automaton import SuffixAutomaton

_LEAST_MATCH = 2  # tokens; a shorter one says little
_MOST_TOKENS = 1 << 15  # of a text; a longer one goes on with its last half
_HALF_SURE = 3  # length of a match behind which the next token is as likely as not the same


class PromptLookup:
    """Proposes from each sequence's own text."""

    name = "prompt_lookup"
    costs = False

    def __init__(self) -> None:
        self._texts: dict[str, SuffixAutomaton] = {}
        self._num_read: dict[str, int] = {}

    def propose(self, sequence: Sequence, most: int) -> Draft:
        """Return what followed the longest match; where that reaches the end of the text, it goes round."""
        text = self._read(sequence)
        length, place = text.longest()
        if length < _LEAST_MATCH:
            return NO_DRAFT
        tokens: list[int] = []
        size = len(text.text)
        for at in range(place, place + most):
            tokens.append(text.text[at] if at < size else tokens[at - size])
        return Draft(tuple(tokens), (length / (length + _HALF_SURE),) * most)

    def saw(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Nothing: texts say all."""

    def forget(self, id: str) -> None:
        """Drop a sequence's text."""
        self._texts.pop(id, None)
        self._num_read.pop(id, None)

    def _read(self, sequence: Sequence) -> SuffixAutomaton:
        """Return a sequence's text with all its tokens."""
        text = self._texts.get(sequence.id)
        new = sequence.tokens_from(self._num_read.get(sequence.id, 0))
        if text is None or len(text.text) + len(new) > _MOST_TOKENS:
            whole = new if text is None else text.text + new
            new = whole if len(whole) <= _MOST_TOKENS else whole[-_MOST_TOKENS // 2 :]
            text = self._texts[sequence.id] = SuffixAutomaton()
        for token in new:
            text.append(token)
        self._num_read[sequence.id] = sequence.length
        return text
