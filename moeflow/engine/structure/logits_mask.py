"""The logits processor by which transformers' `generate` follows a grammar, for one sequence.

Knows `generate`'s calls. Knows nothing of how an answer is shown.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moeflow.engine.structure.grammars import grammars_of
from moeflow.engine.structure.matcher import TokenMatcher
from moeflow.errors import MoeflowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def masked(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return logits [..., V] with -inf for every token that is not allowed, those beyond the tokenizer's included.

    Args:
        logits: [..., V].
        allowed: [tokens of the tokenizer] bool.
    """
    num_logits = logits.shape[-1]
    allowed = torch.nn.functional.pad(allowed[:num_logits], (0, max(0, num_logits - len(allowed))))
    return logits.masked_fill(~allowed.to(logits.device), -math.inf)


class GrammarProcessor:
    """Masks the scores of one sequence in `generate`.

    Args:
        matcher: at the answer's beginning.
        num_prompt: tokens of the prompt.
        end_tokens: those at which the model ends an answer.
    """

    def __init__(self, matcher: TokenMatcher, num_prompt: int, end_tokens: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._num_read = num_prompt
        self._end_tokens = end_tokens

    @classmethod
    def start(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: tuple[int, ...],
        structure: tuple[str, str],
        num_prompt: int,
    ) -> GrammarProcessor:
        """Return the processor of an answer that `structure` of SamplingParams binds.

        Raises:
            ConfigError: it cannot be compiled.
        """
        return cls(grammars_of(tokenizer, end_tokens).start(*structure), num_prompt, end_tokens)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow what was read."""
        return self._matcher.complete

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V] with -inf for what may not follow input_ids [1, S].

        Raises:
            MoeflowError: the model has no score for any token that may follow.
        """
        self.follow(input_ids)
        allowed = self._matcher.allowed
        if self._matcher.forced:
            allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
            allowed[self._matcher.forced[:1]] = True
        scores = masked(scores, allowed)
        if not (scores > -math.inf).any():
            raise MoeflowError("the answer cannot go on: its grammar allows only tokens that the model does not say.")
        return scores

    def follow(self, input_ids: torch.Tensor) -> bool:
        """Take the new tokens of input_ids [1, S], and tell whether the answer is complete.

        Raises:
            MoeflowError: the grammar does not go on.
        """
        new = input_ids[0, self._num_read :].tolist()
        self._num_read += len(new)
        try:
            for token_id in new:
                if token_id not in self._end_tokens:
                    self._matcher.push(token_id)
        except RuntimeError as error:
            raise MoeflowError(f"the answer cannot go on: {error}.") from error
        return self.complete
