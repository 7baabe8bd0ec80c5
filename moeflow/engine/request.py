"""A request of an engine, its outputs step by step, and its completion.

Knows sampling and stop strings. Knows nothing of passes or slots.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from moeflow.engine.sampling import Sampler
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Sequence
from moeflow.engine.stop_strings import StopStrings

TokenLogprob = tuple[float | None, list[tuple[int, float]]]  # a token's, and (token id, logprob) of the likeliest


_SCORED_ROWS = 64  # at once, since each is as long as the vocabulary


class Completion(NamedTuple):
    """A request that ended.

    Args:
        id: its name.
        prompt_ids: its prompt.
        token_ids: what was generated, the end-of-sequence token included.
        text: of these, up to a stop string; empty where the engine has no tokenizer.
        finish_reason: "stop" (the model ended, or a stop string came), "length", "cancelled" or "error".
        error: the reason, for "error".
        logprobs: (logprob, [(token id, logprob)]) of each token; None where not asked for.
        prompt_logprobs: the same of each token of the prompt, None of the first; None where not asked for.
        cached_tokens: tokens of the prompt that were not computed, since others had computed them.
    """

    id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0


class StepOutput(NamedTuple):
    """Output of one step for one request.

    Args:
        id: which.
        token_ids: new tokens.
        text: new text; may come later than its tokens.
        completion: set where it ended.
        logprobs: of the new tokens, as in `Completion`; None where not asked for.
    """

    id: str
    token_ids: list[int]
    text: str
    completion: Completion | None
    logprobs: list[TokenLogprob] | None = None


class Request:
    """A sequence with its sampler, its stop strings and its text so far."""

    def __init__(self, sequence: Sequence, params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.sequence = sequence
        self.params = params
        self.sampler = Sampler(params)
        self.stops: StopStrings | None = None
        if tokenizer is not None:
            skips = params.skip_special_tokens
            self.stops = StopStrings(tokenizer, params.stop, sequence.prompt_ids, skip_special_tokens=skips)
        self.text = ""  # what is certain of the answer so far
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(sequence.prompt_ids)
            sequence.scored = True

    def score(self, logits: torch.Tensor | None) -> None:
        """Note how likely the prompt's next tokens are, where that was asked for.

        Args:
            logits: [N, V], of the prompt's tokens from the first that is not computed; None where there are none.
        """
        most, begin = self.params.prompt_logprobs, self.sequence.num_computed + 1
        if logits is None or self.prompt_logprobs is None or most is None or self.sequence.token_ids:
            return
        next_ids = self.sequence.prompt_ids[begin : begin + len(logits)]
        ids = torch.tensor(next_ids, dtype=torch.long, device=logits.device)
        for rows, own in zip(logits[: len(ids)].split(_SCORED_ROWS), ids.split(_SCORED_ROWS), strict=True):
            logprobs = rows.float().log_softmax(-1)
            chosen = logprobs.gather(1, own[:, None])[:, 0].tolist()
            values, places = logprobs.topk(min(most, logprobs.shape[1]))
            for logprob, likeliest, their in zip(chosen, places.tolist(), values.tolist(), strict=True):
                self.prompt_logprobs[begin] = logprob, list(zip(likeliest, their, strict=True))
                begin += 1

    def choose(self, logits: torch.Tensor, end_tokens: Collection[int]) -> tuple[int, str, str | None]:
        """Sample the next token and append it.

        Args:
            logits: [V], of the last token.
            end_tokens: those at which the model ends an answer.

        Returns:
            The token, the text that is now certain, and the reason if the answer ends with it.

        Raises:
            RuntimeError: nothing can be drawn from these logits.
        """
        sequence = self.sequence
        sampled = self.sampler.sample(logits, sequence.prompt_ids, sequence.token_ids)
        sequence.append(sampled.token_id)
        if self.logprobs is not None:
            self.logprobs.append((sampled.logprob, sampled.top))
        ends = sampled.token_id in end_tokens and not self.params.ignore_eos
        text, stopped = "", False
        if self.stops is not None:
            text, stopped = self.stops.push(sampled.token_id, visible=not ends)
            self.text += text
        reason = "stop" if ends or stopped else "length" if len(sequence.token_ids) == sequence.max_new_tokens else None
        return sampled.token_id, text, reason

    def output(self, token_ids: list[int], text: str, completion: Completion | None = None) -> StepOutput:
        """Return what a step gave this request: its newest tokens, the text that is now certain, and its end."""
        logprobs = None if self.logprobs is None else self.logprobs[len(self.logprobs) - len(token_ids) :]
        return StepOutput(self.sequence.id, token_ids, text, completion, logprobs)

    def finish(self, reason: str, error: str | None) -> tuple[str, Completion]:
        """Return the text that was held back until now, and the completion."""
        rest = "" if self.stops is None else self.stops.finish()
        self.text += rest
        sequence = self.sequence
        completion = Completion(
            sequence.id,
            sequence.prompt_ids,
            sequence.token_ids,
            self.text,
            reason,
            error,
            self.logprobs,
            self.prompt_logprobs,
            sequence.num_cached or 0,
        )
        return rest, completion


class Outputs:
    """Outputs of steps on their way to who asked: of each claimed request apart, the others in one queue."""

    def __init__(self) -> None:
        self._queue: list[StepOutput] = []
        self._claimed: dict[str, list[StepOutput]] = {}

    def __bool__(self) -> bool:
        return bool(self._queue)

    def put(self, output: StepOutput) -> None:
        """Add an output of a step."""
        self._claimed.get(output.id, self._queue).append(output)

    def claim(self, id: str) -> None:
        """Keep the outputs of a request apart from now on."""
        self._claimed[id] = []

    def drop(self, id: str) -> None:
        """Forget a claimed request and its outputs."""
        self._claimed.pop(id, None)

    def take(self, ids: list[str] | None = None) -> list[StepOutput]:
        """Return, once each, the outputs of these claimed requests, or those in the queue."""
        queues = [self._queue] if ids is None else [self._claimed[id] for id in ids]
        taken = [output for queue in queues for output in queue]
        for queue in queues:
            queue.clear()
        return taken

    def clear(self) -> None:
        """Forget every output."""
        for queue in (self._queue, *self._claimed.values()):
            queue.clear()
