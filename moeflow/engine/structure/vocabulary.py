"""A tokenizer as llguidance reads it: the bytes of each token, which are special, and which end an answer.

Knows tokenizers. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from moeflow.errors import ConfigError
from moeflow.hf.wall import one_line, wall

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

_END = "<|moeflow: the end of an answer|>"


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        tokenizer: the model's.
        end_tokens: those at which the model ends an answer; there may be none.

    Attributes:
        tokens: what llguidance made of it.
        size: V, tokens of the tokenizer.
        end_tokens: those of the end that the tokenizer has.
        written_end_tokens: those of them that have text, so that a grammar may ask for them in an answer's middle.
        special: token id: text of the special tokens, which a grammar may name and no text matches.

    Raises:
        ConfigError: the tokenizer is a slow one, or of a kind that llguidance cannot read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> None:
        self.tokens, self.size = _read(tokenizer, end_tokens)
        self.end_tokens = [token for token in end_tokens if 0 <= token < self.size]
        added = {token: text for text, token in tokenizer.get_added_vocab().items() if token < self.size}
        self.special = {token: text for token, text in added.items() if self.tokens.is_special_token(token)}
        self.written_end_tokens = [token for token in self.end_tokens if not self.tokens.is_special_token(token)]


def _read(tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> tuple[LLTokenizer, int]:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"structured output needs a tokenizer of the tokenizers library, this is a {type(tokenizer).__name__}: "
            "leave json_schema, regex and grammar out, or give the model's fast tokenizer."
        )

    def tell(error: BaseException) -> ConfigError:
        return ConfigError(
            f"structured output cannot read this model's tokenizer, a {type(tokenizer).__name__}: {one_line(error)}. "
            "Leave json_schema, regex and grammar out."
        )

    with wall(tell):
        own = Tokenizer.from_str(backend.to_str())  # a copy, since padding and truncation are changed
        own.no_padding()
        own.no_truncation()
        size = max(own.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = [token for token in end_tokens if 0 <= token < size]
        if not ends:  # llguidance wants one; the model has no logit for it
            own.add_special_tokens([_END])
            ends = [own.get_vocab(with_added_tokens=True)[_END]]
        return LLTokenizer(own.to_str(), eos_token=ends), size
