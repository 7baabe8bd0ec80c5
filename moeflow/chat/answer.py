"""One streamed answer: generated in a thread, its text piece by piece, and how long it took.

Knows nothing about conversations, terminals or experts: any transformers causal language model works.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from moeflow.chat.stop_flag import StopFlag
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.text.stop_strings import StopStrings
from moeflow.errors import ConfigError, ForkedProcessError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 512  # of an answer, where nothing else is asked for
# Fields of SamplingParams that `generate` has not, or would do otherwise.
NOT_IN_GENERATE = (
    *("presence_penalty", "frequency_penalty", "stop", "logprobs", "prompt_logprobs", "ignore_eos"),
    "skip_special_tokens",
    "logit_bias",
)


@dataclass(frozen=True)
class Answer:
    """Result of one answer.

    Args:
        text: the decoded answer without special tokens.
        num_prompt_tokens: tokens of the prompt.
        num_new_tokens: tokens generated, the end-of-sequence token included.
        ttft_s: seconds from the call to the first token.
        decode_s: seconds from the first token to the last.
        tokens_per_s: decode rate, the tokens after the first over `decode_s`; None for a single token.
        stopped: "eos" (the model ended, a stop string of its settings came, or the answer's grammar allows no more),
            "length" or "user".
        num_cached_tokens: tokens of the prompt that an earlier answer had computed.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    ttft_s: float
    decode_s: float
    tokens_per_s: float | None
    stopped: str
    num_cached_tokens: int = 0


class _TokenStreamer:
    """The streamer `generate` puts tokens into: notes the time, decodes, queues text as soon as it is whole."""

    def __init__(self, stops: StopStrings, pieces: SimpleQueue[str | None]) -> None:
        self.token_ids: list[int] = []
        self.times_s: list[float] = []
        self.text = ""
        self.stops = stops
        self._pieces = pieces
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of the prompt, then those of each step."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        token_ids = value.flatten().tolist()
        self.token_ids += token_ids
        self.times_s.append(time.perf_counter())
        for token_id in token_ids:
            self._emit(self.stops.push(token_id)[0])

    def end(self) -> None:
        """Queue what is left of the text."""
        self._emit(self.stops.finish())

    def _emit(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._pieces.put(piece)


class AnswerStream:
    """Iterate over an answer's text while it is generated; `answer` holds the figures once it has ended.

    Leaving the `with` block, `close()`, or dropping the last reference stops the generation after the token it
    is working on. An error in the generating thread is raised by the iteration, or by `close()`.

    Args:
        generate: generates the whole answer; runs in a thread.
        pieces: where it puts text.
        closed: set where it is to stop.
        describe: returns the figures, given the time of the beginning.
    """

    def __init__(
        self,
        generate: Callable[[], None],
        pieces: SimpleQueue[str | None],
        closed: threading.Event,
        describe: Callable[[float], Answer],
    ) -> None:
        self.answer: Answer | None = None
        self._closed = closed
        self._describe = describe
        self._pieces = pieces
        self._finished = False
        self._process_id = os.getpid()
        self._begin_s = time.perf_counter()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moeflow-answer")
        self._future = self._executor.submit(generate)
        self._future.add_done_callback(lambda _: pieces.put(None))

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if self._finished:
            raise StopIteration
        self._check_process()
        piece = None
        if not (self._future.done() and self._pieces.empty()):  # else an interrupt came after the last piece
            piece = self._pieces.get()
        if piece is None:
            self._finish()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Stop generating and wait for the thread to end. After an interrupt in here, a second call waits on."""
        if not self._finished and os.getpid() == self._process_id:
            self._closed.set()
            self._finish()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()

    def _check_process(self) -> None:
        if os.getpid() != self._process_id:
            raise ForkedProcessError(
                "this answer is generated by the process that forked this one. Start another answer here."
            )

    def _finish(self) -> None:
        self._executor.shutdown(wait=True)
        if self._future.exception() is None:
            self.answer = self._describe(self._begin_s)
        self._finished = True  # not before: after an interrupt all of this is done again
        self._future.result()


def checkpoint_params(model: PreTrainedModel, **given: Any) -> SamplingParams:
    """Return the sampling that a checkpoint's generation settings ask for, where nothing else is given.

    Args:
        model: a transformers model with `generate`.
        **given: fields of SamplingParams that take the place of the checkpoint's.

    Raises:
        ConfigError: a value is out of its range.
    """
    from moeflow.hf.passes.forward import sampling_settings

    settings = sampling_settings(model)
    samples = settings.pop("do_sample") or not given.keys().isdisjoint(("temperature", "top_p", "top_k"))
    if not samples:
        settings["temperature"] = 0.0
    settings = {name: value for name, value in settings.items() if name not in given}
    try:
        SamplingParams(**settings)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint's generation_config.json: {error}. Correct it, or give a value.") from None
    return SamplingParams(**{"max_new_tokens": MAX_NEW_TOKENS, **settings, **given})


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    params: SamplingParams,
    *,
    stop: StopFlag | None = None,
) -> AnswerStream:
    """Start generating an answer and return the iterator over its text.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        input_ids: [1, num_prompt_tokens], the prompt.
        params: the sampling; its seed seeds torch's generators, which the whole process shares, and None leaves them
            as they are. What else the checkpoint's generation settings say (suppressed tokens, stop strings) holds.
        stop: setting it ends the answer after the token in progress.

    Returns:
        The iterator. After the last piece its `answer` is an `Answer`.

    Raises:
        ConfigError: input_ids is no prompt, params ask for what `generate` has not, their schema or grammar cannot be
            compiled, or the generation settings have stop strings that the tokenizer cannot write. What goes wrong
            while generating is raised by the iterator.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

    from moeflow.engine.structure.logits_mask import GrammarProcessor
    from moeflow.hf.passes.forward import end_tokens, stop_strings
    from moeflow.hf.wall import one_line, raised_in

    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ConfigError(f"input_ids has shape {list(input_ids.shape)}; it must be [1, num_prompt_tokens], not empty")
    for name in NOT_IN_GENERATE:
        if getattr(params, name) != getattr(SamplingParams, name):
            raise ConfigError(f"{name} is {getattr(params, name)!r}; only the engine and `moeflow batch` know it")
    ends, stop_texts = end_tokens(model, tokenizer), stop_strings(model)
    grammar = None
    if params.structure is not None:
        grammar = GrammarProcessor.start(tokenizer, ends, params.structure, input_ids.shape[1])
    asked_to_stop = stop or StopFlag()
    closed = threading.Event()
    pieces: SimpleQueue[str | None] = SimpleQueue()
    streamer = _TokenStreamer(StopStrings(tokenizer, stop_texts, input_ids[0].tolist()), pieces)
    input_ids = input_ids.to(model.device)

    def stop_requested(generated_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        complete = grammar is not None and grammar.follow(generated_ids)
        stop = complete or asked_to_stop.is_set() or closed.is_set()
        return torch.full((generated_ids.shape[0],), stop, dtype=torch.bool, device=generated_ids.device)

    options = {"max_new_tokens": params.max_new_tokens, "num_beams": 1, **_generate_options(model, params)}
    if grammar is not None:
        options["logits_processor"] = LogitsProcessorList([grammar])
    if stop_texts:
        options["tokenizer"] = tokenizer
        try:
            StopStringCriteria(tokenizer, list(stop_texts))  # transformers keeps it for generate
        except ValueError as error:
            raise ConfigError(
                f"the model's tokenizer has no token for stop_strings {list(stop_texts)!r} of its generation settings: "
                "take them out of generation_config.json."
            ) from error
    if ends:
        pad_token_id = tokenizer.pad_token_id
        options["eos_token_id"] = list(ends)
        options["pad_token_id"] = ends[0] if pad_token_id is None else pad_token_id

    def generate() -> None:
        if params.seed is not None:
            torch.manual_seed(params.seed)
        try:
            cast("GenerationMixin", model).generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop_requested]),
                **options,
            )
        except Exception as error:
            # What `generate` itself refuses is a setting of the checkpoint: those of the request are checked.
            if not raised_in(error, "transformers.generation"):
                raise
            raise ConfigError(
                f"transformers cannot generate with the checkpoint's generation_config.json ({one_line(error)}). "
                "Correct the field, or download the file again."
            ) from error

    def describe(begin_s: float) -> Answer:
        num_new_tokens = len(streamer.token_ids)
        decode_s = streamer.times_s[-1] - streamer.times_s[0]
        is_complete = streamer.stops.found is not None or (grammar is not None and grammar.complete)
        if streamer.token_ids[-1] in ends or is_complete:
            stopped = "eos"
        else:
            stopped = "length" if num_new_tokens >= params.max_new_tokens else "user"
        return Answer(
            text=streamer.text,
            num_prompt_tokens=input_ids.shape[1],
            num_new_tokens=num_new_tokens,
            ttft_s=streamer.times_s[0] - begin_s,
            decode_s=decode_s,
            tokens_per_s=(num_new_tokens - 1) / decode_s if decode_s > 0 else None,
            stopped=stopped,
        )

    return AnswerStream(generate, pieces, closed, describe)


def _generate_options(model: PreTrainedModel, params: SamplingParams) -> dict[str, Any]:
    """Return the sampling under the names of `generate`."""
    options: dict[str, Any] = {"repetition_penalty": params.repetition_penalty}
    if params.temperature == 0:
        # transformers' neutral values, or it warns about the checkpoint's sampling settings it is not to use.
        return options | {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    options |= {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    if params.min_p or model.generation_config.min_p:  # a min_p of 0 would cost a softmax a token
        options["min_p"] = params.min_p
    return options
