"""A request of an engine, its outputs step by step, and its completion.

Knows sampling and stop strings. Knows nothing of passes or slots.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from moeflow.engine.sampling import Sampler
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Sequence
from moeflow.engine.structure.grammars import grammars_of
from moeflow.engine.text.stop_strings import StopStrings

TokenLogprob = tuple[float | None, list[tuple[int, float]]]  # a token's, and (token id, logprob) of the likeliest


_SCORED_ROWS = 64  # at once, since each is as long as the vocabulary


class Completion(NamedTuple):
    """A request that ended.

    Args:
        id: its name.
        prompt_ids: its prompt.
        token_ids: what was generated, the end-of-sequence token included where the model chose one.
        text: of these, up to a stop string; empty where the engine has no tokenizer.
        finish_reason: "stop" (the model ended, a stop string came, or the answer's grammar allows no more), "length",
            "cancelled" or "error".
        error: the reason, for "error".
        logprobs: (logprob, [(token id, logprob)]) of each token; None where not asked for.
        prompt_logprobs: the same of each token of the prompt, None of the first; None where not asked for.
        cached_tokens: tokens of the prompt that were not computed, since others had computed them.
        stop: the stop string that ended it; None where something else did.
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
    stop: str | None = None


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


class Chosen(NamedTuple):
    """What one pass gave a request.

    Args:
        token_ids: new tokens, at least one unless an error came.
        text: the text that is now certain.
        reason: the finish reason, where the answer ends with them.
        error: the reason, for "error".
        num_accepted: tokens of the draft that were chosen, and whose positions are computed so.
        num_judged: tokens of the draft that were compared with a chosen one.
    """

    token_ids: list[int]
    text: str
    reason: str | None
    error: str | None = None
    num_accepted: int = 0
    num_judged: int = 0


class Request:
    """A sequence with its sampler, its grammar, its stop strings and its text so far.

    Args:
        sequence: what is computed.
        params: what is asked.
        tokenizer: the model's; None where the prompt is token ids, and nothing that is asked needs text.
        end_tokens: those at which the model ends an answer.
        jump_forward: whether several tokens that the grammar forces are taken at once.

    Raises:
        ConfigError: what binds the answer's text cannot be compiled.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerBase | None,
        end_tokens: tuple[int, ...] = (),
        jump_forward: bool = True,
    ) -> None:
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
        self._end_tokens = end_tokens
        self._jumps = jump_forward and params.logprobs is None  # each log-probability needs logits
        self._matcher = None
        if tokenizer is not None and params.structure is not None:
            kind, text = params.structure
            self._matcher = grammars_of(tokenizer, end_tokens).start(kind, text, ignore_eos=params.ignore_eos)

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

    def choose(self, logits: torch.Tensor, draft: tuple[int, ...] = ()) -> Chosen:
        """Choose the next token and append it, and with it those that the grammar forces behind it.

        While the chosen tokens are those of the draft, the next is chosen from the logits behind them. So each token is
        chosen from the logits, and by the draws, by which it would be without a draft.

        Args:
            logits: [1 + D, V], of the last token and of the draft behind it.
            draft: [D] tokens that were computed as well.
        """
        num_tokens, num_letters = len(self.sequence.token_ids), len(self.text)
        error, new = None, 0
        try:
            while True:
                reason = self._take(logits[new])
                while reason is None and self._jumps_on():
                    reason = self._take(logits[new])
                taken = self.sequence.token_ids[num_tokens:]
                new = len(taken)
                if reason is not None or taken != list(draft[:new]):
                    break
        except RuntimeError as raised:
            reason, error = "error", f"no token could be chosen from the model's logits: {raised}"
        taken = self.sequence.token_ids[num_tokens:]
        judged = min(len(taken), len(draft))
        accepted = next((i for i, pair in enumerate(zip(taken, draft, strict=False)) if pair[0] != pair[1]), None)
        accepted = judged if accepted is None else accepted
        self.sequence.num_computed += min(accepted, max(0, len(taken) - 1))  # the last chosen one is never computed
        return Chosen(taken, self.text[num_letters:], reason, error, accepted, min(judged, accepted + 1))

    def _jumps_on(self) -> bool:
        """Tell whether the next token needs no logits, nor a pass of its own length."""
        sequence = self.sequence
        if not self._jumps or self._matcher is None or not self._matcher.forced:
            return False
        return sequence.scaling_of(sequence.length) == sequence.scaling_of(sequence.length + 1)

    def _take(self, logits: torch.Tensor) -> str | None:
        """Append one token and its text, and return the finish reason where the answer ends with it."""
        sequence, matcher = self.sequence, self._matcher
        if matcher is not None and matcher.forced:
            if matcher.forced[0] >= len(logits):
                raise RuntimeError("the model has none for the token that the answer's grammar asks for")
            sampled = self.sampler.report(matcher.forced[0], logits)
        else:
            allowed = None if matcher is None else matcher.allowed
            sampled = self.sampler.sample(logits, sequence.prompt_ids, sequence.token_ids, allowed)
        sequence.append(sampled.token_id)
        if self.logprobs is not None:
            self.logprobs.append((sampled.logprob, sampled.top))
        ends = sampled.token_id in self._end_tokens and not self.params.ignore_eos
        stopped = False
        if self.stops is not None:
            text, stopped = self.stops.push(sampled.token_id, visible=not ends)
            self.text += text
        if ends or stopped:
            return "stop"
        if matcher is not None:
            matcher.push(sampled.token_id)
            if matcher.complete:
                return "stop"
        return "length" if len(sequence.token_ids) == sequence.max_new_tokens else None

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
            self.stops.found if self.stops is not None and reason == "stop" else None,
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
