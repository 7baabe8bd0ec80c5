"""Sampling parameters of one request, and their checks.

Knows numbers and texts. Knows nothing of tensors or models; imports no torch, so that the command line can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeflow.errors import ConfigError

_MIN_TEMPERATURE = 1e-5  # below it, float32 logits over the temperature may overflow


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
        ignore_eos: go on behind the model's end-of-sequence token.
        skip_special_tokens: whether special tokens have no text in the answer; else they are written, but for the one
            that ends it.

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
