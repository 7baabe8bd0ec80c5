"""How far one answer is in its grammar: the tokens that may follow, those that must, and whether it is complete.

Knows token ids. Knows nothing of logits or sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moeflow.engine.structure.compiling import reason
from moeflow.engine.structure.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenMatcher:
    """Follows the tokens of one answer.

    Args:
        matcher: of llguidance, at the answer's beginning; used by no other.
        vocabulary: whose tokens these are.
        ignore_eos: whether an end token is never allowed; the answer then goes on until nothing may follow.

    Attributes:
        forced: tokens that must come next, in their order.
        allowed: [V] bool, the tokens of which one must come next, where none is forced.
        complete: whether nothing but an end may follow.

    Raises:
        RuntimeError: no token can begin the answer.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, *, ignore_eos: bool = False) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ignore_eos = ignore_eos
        self.forced: list[int] = []
        self.allowed = torch.zeros(0, dtype=torch.bool)
        self.complete = False
        self._look()

    def push(self, token_id: int) -> None:
        """Take the next token of the answer, which is no end.

        Raises:
            RuntimeError: the grammar does not allow it, no token can follow, or the grammar became too complex.
        """
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"the answer's grammar does not go on: {reason(self._matcher)}")
        del self.forced[:1]
        if not self.forced:
            self._look()

    def _look(self) -> None:
        """Find what may follow. Forced tokens are asked for anew once all are taken, so that they depend on no mode."""
        matcher, vocabulary = self._matcher, self._vocabulary
        forced = matcher.compute_ff_tokens()
        # An end token that has text would end the answer there: it is none that may be forced.
        places = [forced.index(token) for token in vocabulary.written_end_tokens if token in forced]
        self.forced = forced[: min(places, default=len(forced))]
        if self.forced:
            return
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=vocabulary.size, bitorder="little").view(np.bool_)
        if matcher.is_error():
            raise RuntimeError(f"the answer's grammar does not go on: {reason(matcher)}")
        accepting = matcher.is_accepting()
        ends = allowed[vocabulary.end_tokens]
        allowed[vocabulary.end_tokens] = False
        self.complete = accepting and not allowed.any()
        if not self._ignore_eos and not (matcher.is_stopped() and not accepting):
            allowed[vocabulary.end_tokens] = ends
            if not accepting:
                allowed[vocabulary.written_end_tokens] = False
        if not self.complete and not allowed.any():
            raise RuntimeError("the answer's grammar does not go on: no token of the model's is allowed next")
        self.allowed = torch.from_numpy(allowed)
