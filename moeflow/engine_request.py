"""What an engine's users give and get: one request, what a step brought it, and how it ended."""

from typing import NamedTuple

from moeflow.sampling import Sampler, SamplingParams
from moeflow.sequences import Sequence
from moeflow.stop_strings import StopStrings


class Completion(NamedTuple):
    """A request that ended.

    Args:
        id: its name.
        prompt_ids: its prompt.
        token_ids: what was generated, the end-of-sequence token included.
        text: of these, up to a stop string; empty where the engine has no tokenizer.
        finish_reason: "stop" (the model ended, or a stop string came), "length", "cancelled" or "error".
        error: what went wrong, for "error".
        logprobs: (logprob, [(token id, logprob)]) of each token; None where not asked for.
    """

    id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None
    logprobs: list | None


class Progress(NamedTuple):
    """What a step brought to one request.

    Args:
        id: which.
        token_ids: new tokens.
        text: new text; may come later than its tokens.
        completion: set where it ended.
    """

    id: str
    token_ids: list[int]
    text: str
    completion: Completion | None


class Request:
    """A sequence and what its user wants of it."""

    def __init__(self, sequence: Sequence, params: SamplingParams, tokenizer):
        self.sequence = sequence
        self.params = params
        self.sampler = Sampler(params)
        self.stops = None if tokenizer is None else StopStrings(tokenizer, params.stop)
        self.text = ""
        self.logprobs = None if params.logprobs is None else []
