"""What answers one chat's prompts: an engine, which keeps the conversation, or `generate` where the model needs it.

Knows the engine's outputs and the thread of an answer. Knows nothing of messages or terminals.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

from moeflow.chat.answer import Answer, AnswerStream, stream_answer
from moeflow.chat.stop_flag import StopFlag
from moeflow.errors import ConfigError, MoeflowError, UnsupportedModelError
from moeflow.fit.contract import Contract

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeflow.engine.engine import Engine
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.engine.sampling_params import SamplingParams

_STOPPED = {"stop": "eos", "length": "length", "cancelled": "user"}
_MOST_POSITIONS = 1 << 17  # of a prompt in one pass, where the model's context is not known
_LEAST_KEPT_BYTES = 2 << 30


class Answerer:
    """Answers the prompts of one model, one at a time; the next one computes only what is new.

    An engine answers, made at the first prompt. `generate` does where the checkpoint's generation settings say more
    than `SamplingParams` can, where a trace is recorded, and for models that do not generate token by token.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._engine: Engine | None = None
        self._made_in = 0  # process

    def stream(self, input_ids: torch.Tensor, params: SamplingParams, *, stop: StopFlag | None = None) -> AnswerStream:
        """Start an answer and return the iterator over its text.

        Args:
            input_ids: [1, num_prompt_tokens], the prompt.
            params: the sampling.
            stop: setting it ends the answer after the token in progress.

        Raises:
            ConfigError: `generate` must answer, and params or the model's options ask for what it has not.
        """
        if self._made_in != os.getpid():  # a fork has an engine of its own, whatever the parent's was at
            self._engine, self._made_in = _make_engine(self._model, self._tokenizer), os.getpid()
        if self._engine is None:
            return stream_answer(self._model, self._tokenizer, input_ids, params, stop=stop)
        return stream_by_engine(self._engine, input_ids[0].tolist(), params, stop=stop)


def stream_by_engine(
    engine: Engine, prompt_ids: list[int], params: SamplingParams, *, stop: StopFlag | None = None
) -> AnswerStream:
    """Have an engine answer in a thread and return the iterator over the text, as `stream_answer` does.

    Args:
        engine: of the model; others may use it meanwhile.
        prompt_ids: the prompt.
        params: the sampling.
        stop: setting it ends the answer after the token in progress.

    Returns:
        The iterator. It raises MoeflowError where the request ends in an error.
    """
    asked_to_stop, closed = stop or StopFlag(), threading.Event()
    pieces: SimpleQueue[str | None] = SimpleQueue()
    times_s: list[float] = []
    ended: list[Completion] = []

    def take(output: StepOutput) -> None:
        if output.token_ids:
            times_s.append(time.perf_counter())
        if output.text:
            pieces.put(output.text)
        if output.completion is not None:
            ended.append(output.completion)

    def generate() -> None:
        for output in engine.outputs(prompt_ids, params):
            take(output)
            if output.completion is None and (asked_to_stop.is_set() or closed.is_set()):
                engine.cancel(output.id)
        if ended[0].finish_reason == "error":
            raise MoeflowError(ended[0].error)

    def describe(begin_s: float) -> Answer:
        completion = ended[0]
        decode_s, num_new_tokens = times_s[-1] - times_s[0], len(completion.token_ids)
        return Answer(
            text=completion.text,
            num_prompt_tokens=len(prompt_ids),
            num_new_tokens=num_new_tokens,
            ttft_s=times_s[0] - begin_s,
            decode_s=decode_s,
            tokens_per_s=(num_new_tokens - 1) / decode_s if decode_s > 0 else None,
            stopped=_STOPPED[completion.finish_reason],
            num_cached_tokens=completion.cached_tokens,
        )

    return AnswerStream(generate, pieces, closed, describe)


def _make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine | None:
    """Return an engine that runs one sequence, a prompt in one pass; None where `generate` must answer."""
    from moeflow.engine.kv_cache.budget import shared_budget
    from moeflow.engine.serial.choose_engine import engine_for
    from moeflow.hf.passes import forward

    policy = getattr(model, "_moeflow_kv_policy", None)
    if other := forward.other_settings(model):
        if policy is not None:
            raise ConfigError(
                f"kv_policy={policy!r} is obeyed by engines, and generate must answer here: the checkpoint's "
                f"generation settings ask for {', '.join(other)}. Load with kv_policy=None."
            )
        return None
    context = forward.context_positions(model) or _MOST_POSITIONS
    kept: int | str = max(_LEAST_KEPT_BYTES, context * forward.key_value_bytes_per_position(model))
    if isinstance(getattr(getattr(model, "moeflow", None), "plan", None), Contract) or shared_budget(model):
        kept = "auto"  # what the plan has, or what is shared with experts
    try:
        return engine_for(model, tokenizer, max_batch_size=1, max_step_tokens=context, kv_memory=kept)
    except (ConfigError, UnsupportedModelError):  # what is wrong with the settings, `generate` tells as well
        if policy is not None:
            raise
        return None
