"""Sampling parameters of one request, and their checks.

Knows numbers and texts. Knows nothing of tensors or models; imports no torch, so that the command line can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeflow.engine.structure.schema import bounded_text, schema_text
from moeflow.errors import ConfigError

_MIN_TEMPERATURE = 1e-5  # below it, float32 logits over the temperature may overflow
_MOST_BIAS = 100.0
_MOST_BIASES = 1024
STRUCTURES = ("json_schema", "regex", "grammar")  # fields that bind an answer's text, of which one may be given


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Args:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: number of tokens sampled from, and those as likely as the last of them; 0 for all.
        top_p: share of the probability sampled from, above 0 and at most 1.
        min_p: leave out tokens less likely than this share of the likeliest one's probability, 0 to 1.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or answer.
        presence_penalty: taken off the logits of tokens in the answer.
        frequency_penalty: taken off the logits of tokens in the answer as often as they are in it.
        seed: of this request's draws; None takes one from torch's default generator.
        stop: texts that end the answer and are not part of it, special tokens (`<|im_end|>`) included; where none are
            given, those of the model's generation settings.
        logprobs: number of likeliest tokens to report with each token, 0 for the token alone; None for no report.
        prompt_logprobs: the same of each token of the prompt but the first, which then is computed whole.
        ignore_eos: go on behind the model's end-of-sequence token. A bound answer then gets none, and ends where
            nothing may follow.
        skip_special_tokens: whether special tokens have no text in the answer; else they are written, but for the one
            that ends it.
        logit_bias: token id: what is added to its logit, -100 to 100. Kept as pairs, by token.
        json_schema: the answer is JSON that this schema allows: an object or its text, kept as text.
        regex: the answer matches this regular expression as a whole.
        grammar: the answer is a text of this grammar, in llguidance's form of Lark; at most one of the three.

    Raises:
        ConfigError: a value is out of its range; the message names field, value and what is allowed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k"):
            self._check(name, _is_int, "a whole number")
        for name in ("seed", "logprobs", "prompt_logprobs"):
            self._check(name, lambda value: value is None or _is_int(value), "a whole number or None")
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        ):  # fmt: skip
            self._check(name, _is_number, "a finite number")
            object.__setattr__(self, name, float(getattr(self, name)))  # torch takes no integers beyond 64 bits
        self._check("max_new_tokens", lambda value: value >= 1, "at least 1")
        self._check(
            "temperature", lambda value: value == 0 or value >= _MIN_TEMPERATURE, "0 (greedy), or 0.00001 and more"
        )
        self._check("top_k", lambda value: value >= 0, "0 (all tokens) or more")
        self._check("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check("min_p", lambda value: 0 <= value <= 1, "0 to 1")
        self._check("repetition_penalty", lambda value: value > 0, "above 0, where 1 changes nothing")
        self._check("seed", lambda value: value is None or 0 <= value < 2**63, "0 to 2**63 - 1, or None")
        for name in ("logprobs", "prompt_logprobs"):
            self._check(name, lambda value: value is None or value >= 0, "0 or more, or None")
        self._check("stop", _is_texts, "a tuple or list of texts, none of them empty")
        for name in ("ignore_eos", "skip_special_tokens"):
            self._check(name, lambda value: isinstance(value, bool), "True or False")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        self._check_structure()

    @property
    def structure(self) -> tuple[str, str] | None:
        """What binds the answer's text: "json_schema", "regex" or "grammar", and its text; None where nothing does."""
        return next(((name, getattr(self, name)) for name in STRUCTURES if getattr(self, name) is not None), None)

    def _check_structure(self) -> None:
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; an answer is bound by one of them")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        elif given:
            bounded_text(getattr(self, given[0]), given[0])

    def _check(self, name: str, holds: Callable[[Any], bool], allowed: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    """Return logit biases as pairs, by token.

    Raises:
        ConfigError: these are none.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ConfigError(f"logit_bias is {given!r:.80}; it must be {{token id: -100 to 100}}")
    if len(pairs) > _MOST_BIASES:
        raise ConfigError(f"logit_bias has {len(pairs):,} tokens; at most {_MOST_BIASES:,} are allowed")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        # JSON has no keys but texts.
        token_id = int(token) if isinstance(token, str) and token.isascii() and token.isdecimal() else token
        if not _is_int(token_id) or not 0 <= token_id < 2**31:
            raise ConfigError(f"logit_bias has {token!r:.40}, which is no token id; write {{token id: -100 to 100}}")
        if not _is_number(bias) or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise ConfigError(f"logit_bias of token {token_id} is {bias!r:.40}; it must be -100 to 100")
        if token_id in biases:
            raise ConfigError(f"logit_bias has token {token_id} twice; give it once")
        biases[token_id] = float(bias)
    return tuple(sorted(biases.items()))
