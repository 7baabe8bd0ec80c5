"""Compiled grammars: one for each tokenizer and text, the most recently used ones kept.

Knows tokenizers and texts. Knows nothing of requests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from moeflow.engine.structure.compiling import check_compiles, compiled
from moeflow.engine.structure.matcher import TokenMatcher
from moeflow.engine.structure.vocabulary import Vocabulary
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

MOST_KEPT = 32  # compiled grammars of a tokenizer


class Grammars:
    """The compiled grammars of one tokenizer, safe to use from any thread.

    Args:
        vocabulary: whose tokens answers are made of.

    Attributes:
        num_compiled: texts that were compiled.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.num_compiled = 0
        self._vocabulary = vocabulary
        self._kept: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def start(self, kind: str, text: str, *, ignore_eos: bool = False) -> TokenMatcher:
        """Return a matcher at the beginning of an answer. A text that is not kept is compiled first.

        Args:
            kind: "json_schema", "regex" or "grammar".
            text: of this kind.
            ignore_eos: as in SamplingParams.

        Raises:
            ConfigError: the text cannot be compiled within limits of time and memory, or allows no answer.
        """
        with self._lock:
            base = self._kept.get((kind, text))
            if base is not None:
                self._kept.move_to_end((kind, text))
        if base is None:
            base = self._compile(kind, text)
            with self._lock:
                self.num_compiled += 1
                self._kept[kind, text] = base
                while len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
        return TokenMatcher(base.deep_copy(), self._vocabulary, ignore_eos=ignore_eos)

    def _compile(self, kind: str, text: str) -> LLMatcher:
        check_compiles(kind, text, self._vocabulary.size, self._vocabulary.special)
        base = compiled(self._vocabulary.tokens, kind, text)
        try:
            first = TokenMatcher(base.deep_copy(), self._vocabulary)
        except RuntimeError:
            raise ConfigError(f"{kind} allows no answer: no token of the model's can begin one") from None
        if first.complete:
            raise ConfigError(f"{kind} allows the empty answer alone; let it allow a text")
        return base


_of_tokenizer: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], Grammars]] = WeakKeyDictionary()
_lock = threading.Lock()


def grammars_of(tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int]) -> Grammars:
    """Return the grammars of a tokenizer, which live as long as it does. The first call takes up to a second.

    Args:
        tokenizer: the model's.
        end_tokens: those at which the model ends an answer.

    Raises:
        ConfigError: no grammar can be compiled for this kind of tokenizer.
    """
    with _lock:
        known = _of_tokenizer.setdefault(tokenizer, {})
        key = (len(tokenizer), *end_tokens)  # tokens may be added to it
        if key not in known:
            known[key] = Grammars(Vocabulary(tokenizer, end_tokens))
        return known[key]
