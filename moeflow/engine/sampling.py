"""Sampling of the next token of one request from its logits.

The order is that of transformers: what an answer's grammar allows, biases, penalties, temperature, top-k, top-p, min-p,
then the draw: filters choose among the allowed tokens. A request has a sampler
with a generator of its own, so that its tokens depend neither on its batch nor on other requests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from moeflow.dtypes import serial_copy
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.structure.logits_mask import masked

_SUMMED_TOGETHER = 64  # a multiple of the numbers that torch adds up beside each other


class SampledToken(NamedTuple):
    """A chosen token.

    Args:
        token_id: the token.
        logprob: its log-probability in the model's own distribution: softmax of the logits as they came, before
            grammar, biases, penalties, temperature and filters. None where the request asks for no logprobs.
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

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, ())) if params.temperature else 0
        self._generator = torch.Generator().manual_seed(seed)

    def sample(
        self, logits: torch.Tensor, prompt_ids: list[int], token_ids: list[int], allowed: torch.Tensor | None = None
    ) -> SampledToken:
        """Choose the next token.

        Args:
            logits: [V], any float dtype; not changed.
            prompt_ids: the prompt.
            token_ids: the answer so far.
            allowed: [tokens of the tokenizer] bool, those of which one is chosen; None for all.

        Raises:
            RuntimeError: the logits give no distribution, as where the model computed a NaN.
        """
        scores = serial_copy(logits, torch.float32)
        if allowed is not None:
            scores = masked(scores, allowed)
        scores = penalized(biased(scores, self.params), self.params, prompt_ids, token_ids)
        if self.params.temperature == 0:
            token_id = int(scores.argmax())
            if scores[token_id].isnan():
                raise RuntimeError("the logits have a NaN")
            if allowed is not None and scores[token_id] == -math.inf:
                raise RuntimeError("the model has none for the tokens that the answer's grammar allows")
        else:
            probabilities = filtered(scores.cpu(), self.params).softmax(-1)
            token_id = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return self.report(token_id, logits)

    def report(self, token_id: int, logits: torch.Tensor) -> SampledToken:
        """Return a token with the log-probabilities that the request asks for, of the model's logits [V]."""
        if self.params.logprobs is None:
            return SampledToken(token_id, None, [])
        logprobs = serial_copy(logits, torch.float32).log_softmax(-1)
        top = logprobs.topk(min(self.params.logprobs, len(logprobs)))
        return SampledToken(
            token_id, float(logprobs[token_id]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )


def biased(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return logits [V] with the biases of single tokens; the same tensor where there are none."""
    if not params.logit_bias:
        return logits
    ids, biases = zip(*dict(params.logit_bias).items(), strict=True)
    return logits.index_add(0, torch.tensor(ids, device=logits.device), torch.tensor(biases).to(logits))


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

    They are those of transformers' filters, bit for bit, but for which of equally likely tokens a nucleus leaves out:
    here the first ones. One thread makes them, and sorts no more than there is to sort.

    Args:
        scores: [V] float32 on the CPU, penalties taken off; not changed.
        params: its temperature is above 0.
    """
    values = scores.numpy() / np.float32(params.temperature)
    if 0 < params.top_k < len(values):
        last = len(values) - params.top_k
        values = np.where(values < np.partition(values, last)[last], np.float32(-np.inf), values)
    if params.top_p < 1:
        values = _nucleus(values, params.top_p)
    kept = torch.from_numpy(values)
    if params.min_p > 0:
        probabilities = kept.softmax(-1)
        kept = kept.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return kept


def _nucleus(values: np.ndarray, top_p: float) -> np.ndarray:
    """Return scores [V] without the least likely tokens that together have a probability of 1 - top_p at most.

    Only those that were not left out before are sorted. -inf stand before them up to a place at which the sum over all
    sorted ones, which is made in parts of equal size, is the same.
    """
    candidates = np.sort(values[values != -np.inf])
    if len(candidates) < 2:
        return values
    begin = (len(values) - len(candidates)) // _SUMMED_TOGETHER * _SUMMED_TOGETHER
    rising = np.full(len(values) - begin, -np.inf, np.float32)
    num_before = len(rising) - len(candidates)
    rising[num_before:] = candidates
    left_out = torch.from_numpy(rising).softmax(-1).cumsum(-1) <= 1 - top_p
    left_out[-1] = False
    count = int(left_out.sum()) - num_before
    if count <= 0:
        return values
    most = candidates[count - 1]
    leaving = values < most
    equal = np.flatnonzero(values == most)[: count - int(np.searchsorted(candidates, most))]
    leaving[equal] = True  # of equal ones the first
    return np.where(leaving, np.float32(-np.inf), values)


def _ids(token_ids: list[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return token ids as a tensor without those that the model has no logit for."""
    ids = torch.tensor(token_ids, dtype=torch.long, device=device)
    return ids[ids < vocab_size]
