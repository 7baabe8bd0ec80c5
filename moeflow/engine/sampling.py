"""How the next token of one request is chosen from its logits.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p, then the draw. A request has a sampler
with a generator of its own, so that what it gets depends neither on the batch it is in nor on who else samples.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeflow.errors import ConfigError

_MIN_TEMPERATURE = 1e-5  # below it, float32 logits over the temperature may overflow


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of its answer.

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
        stop: texts that end the answer; they are not part of it.
        logprobs: number of likeliest tokens to report with each token, 0 for the token alone; None for no report.
        ignore_eos: go on behind the model's end-of-sequence token.

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
    ignore_eos: bool = False

    def __post_init__(self):
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k"):
            self._check(name, _is_int, "a whole number")
        for name in ("seed", "logprobs"):
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
        self._check("logprobs", lambda value: value is None or value >= 0, "0 or more, or None")
        self._check("stop", _is_texts, "a tuple or list of texts, none of them empty")
        self._check("ignore_eos", lambda value: isinstance(value, bool), "True or False")

    def _check(self, name, holds, allowed):
        value = getattr(self, name)
        if not holds(value):
            raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


class SampledToken(NamedTuple):
    """A chosen token.

    Args:
        token_id: the token.
        logprob: its log-probability in the model's own distribution: softmax of the logits as they came, before
            penalties, temperature and filters. None where the request asks for no logprobs.
        top: (token id, logprob) of the likeliest tokens of that distribution, falling; as many as were asked for.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one request; the same seed and logits give the same tokens on every device.

    Args:
        params: what the request asks.
    """

    def __init__(self, params: SamplingParams):
        self.params = params
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, ())) if params.temperature else 0
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self, logits: torch.Tensor, prompt_ids: list[int], token_ids: list[int]) -> SampledToken:
        """Choose the next token.

        Args:
            logits: [V], any float dtype; not changed.
            prompt_ids: the prompt.
            token_ids: the answer so far.

        Raises:
            RuntimeError: the logits give no distribution, as where the model computed a NaN.
        """
        logits = logits.float()
        scores = penalized(logits, self.params, prompt_ids, token_ids)
        if self.params.temperature == 0:
            token_id = int(scores.argmax())
            if scores[token_id].isnan():
                raise RuntimeError("the logits have a NaN")
        else:
            probabilities = filtered(scores, self.params).softmax(-1).cpu()
            token_id = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self.params.logprobs is None:
            return SampledToken(token_id, None, [])
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self.params.logprobs, len(logprobs)))
        return SampledToken(
            token_id, float(logprobs[token_id]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )


def penalized(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: list[int], token_ids: list[int]
) -> torch.Tensor:
    """Return logits [V] with the three penalties; the same tensor where none is asked for."""
    vocab_size = logits.shape[-1]
    if params.repetition_penalty != 1:
        ids = _ids([*prompt_ids, *token_ids], vocab_size, logits.device)
        seen = logits[ids]
        seen = torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
        logits = logits.scatter(0, ids, seen)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = _ids(token_ids, vocab_size, logits.device).unique(return_counts=True)
        taken = params.presence_penalty + params.frequency_penalty * counts
        logits = logits.index_add(0, ids, -taken.to(logits.dtype))
    return logits


def filtered(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return scores [V] over the temperature, with -inf for the tokens that are not sampled from.

    Args:
        scores: [V] float32, penalties taken off.
        params: its temperature is above 0.
    """
    scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1:
        rising, ids = scores.sort()
        left_out = rising.softmax(-1).cumsum(-1) <= 1 - params.top_p
        left_out[-1] = False
        scores = scores.masked_fill(left_out.scatter(0, ids, left_out), -math.inf)
    if params.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return scores


def _ids(ids, vocab_size, device):
    """Return token ids as a tensor without those that the model has no logit for."""
    ids = torch.tensor(ids, dtype=torch.long, device=device)
    return ids[ids < vocab_size]


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _is_texts(value) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)
