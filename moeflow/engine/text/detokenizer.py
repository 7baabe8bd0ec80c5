"""Incremental detokenizer: a piece of text is given out once later tokens can no longer change it.

Knows a tokenizer's `decode` and nothing else of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_PENDING_TOKENS = 16  # that wait for the rest of a character, which takes at most four
_UNFINISHED = "\ufffd"  # U+FFFD, which half a character reads as


class Detokenizer:
    """Turns the tokens of one text into pieces whose sum is the text of them all.

    A piece costs the decoding of a few tokens, however long the text has become.

    Args:
        tokenizer: the model's.
        skip_special_tokens: whether special tokens have no text; else they are written.

    Attributes:
        pending: what the tokens read as beyond the text that is out; later ones may change it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self.pending = ""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        # The text of the tokens before `_shown` is out already. They are decoded again with each new token, because
        # what a token reads as (a leading space, half a character) depends on the tokens before it.
        self._shown = 0

    def push(self, token_ids: list[int]) -> str:
        """Take the next tokens; returns the text that is now whole, which may be none."""
        return self._take(token_ids, final=False)

    def finish(self) -> str:
        """Return what is left; half a character becomes U+FFFD."""
        return self._take([], final=True)

    def _take(self, token_ids: list[int], final: bool) -> str:
        self._token_ids += token_ids
        known = self._decode(self._shown)
        text = self._decode(len(self._token_ids))
        self.pending = ""
        if len(text) > len(known) and (final or not text.endswith(_UNFINISHED)):
            self._forget(len(self._token_ids))
            return text[len(known) :]
        pending = len(self._token_ids) - self._shown
        if pending > _MAX_PENDING_TOKENS:
            # Bytes that are no text, or special tokens only: all but the last four are what they will ever be.
            end = len(self._token_ids) - 4
            settled = self._decode(end)
            if text.startswith(settled):
                self._forget(end)
                self.pending = text[len(settled) :]
                return settled[len(known) :]
        self.pending = text[len(known) :]
        return ""

    def _forget(self, shown: int) -> None:
        """Keep of the tokens that are out only those that went out last, as context of the next."""
        del self._token_ids[: self._shown]
        self._shown = shown - self._shown

    def _decode(self, end: int) -> str:
        tokens = self._token_ids[:end]
        skip = self._skip_special_tokens
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))
