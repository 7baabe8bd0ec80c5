"""Continuous batching: each step runs one pass over the new tokens of all requests under way.

Knows requests, the scheduler and the model runner. Knows nothing of tensors' layout, files or terminals.
"""

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Sequential
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.kept_prefix import KeptPrefix
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.prompts import Prompts
from moeflow.engine.request import Completion, Request, StepOutput
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.scheduler import Scheduler
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.step_groups import StepGroups
from moeflow.errors import ClosedModelError, ConfigError, MoeflowError
from moeflow.hf import forward
from moeflow.memory_size import MemorySize, parse_memory
from moeflow.trace.recorder import TraceRecorder

_AUTO_KV_BYTES = 2 << 30  # kv_memory="auto" takes no more
_DEFAULT_PARAMS = SamplingParams()


class Engine:
    """Runs requests on a model, as many at once as its limits allow.

    Args:
        model: of `load_moe`, or any transformers causal LM whose cache holds keys and values only.
        tokenizer: the model's; None where prompts are token ids and no text is wanted.
        max_batch_size: the largest number of sequences that run at once.
        max_step_tokens: most tokens in one pass; prompts are cut to fit beside the tokens of those that decode.
        kv_memory: bytes of the keys and values of all sequences at most: a number, "2GiB", or "auto" (enough for
            max_batch_size sequences of the model's whole context, at most 2 GiB). Memory is taken as sequences come.
        share_prefixes: whether equal beginnings of prompts under way are computed once.
        group_size: the largest number of sequences that decode in one pass; below max_batch_size a step takes several
            passes. None: one pass for all, in which every expert is fetched once a step.
        regrouping: whether the token scheduler chooses the groups, so that they activate few experts; else they are in
            the order of arrival. Outputs are the same.

    Raises:
        ConfigError: a limit is no positive number, or kv_memory no size.
        UnsupportedModelError: the model keeps other state than keys and values, or attends in a way of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_size: int = 32,
        max_step_tokens: int = 512,
        kv_memory: MemorySize = "auto",
        share_prefixes: bool = True,
        group_size: int | None = None,
        regrouping: bool = True,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("max_step_tokens", max_step_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed: give a whole number, at least 1.")
        if max_step_tokens < max_batch_size:
            raise ConfigError(
                f"max_step_tokens={max_step_tokens} is less than max_batch_size={max_batch_size}: every sequence that "
                "decodes takes one token of each step. Give at least as many."
            )
        if isinstance(kv_memory, str) and kv_memory.endswith("%"):
            raise ConfigError(f'kv_memory={kv_memory!r} is a share of nothing: give bytes, "2GiB" or "auto".')
        budget_bytes = None if kv_memory == "auto" else parse_memory(kv_memory, name="kv_memory", whole_bytes=0)
        forward.check_key_value_cache(model)
        observers = getattr(getattr(model, "moeflow", None), "observers", ())
        if any(isinstance(observer, TraceRecorder) for observer in observers):
            raise ConfigError("a trace records whole batches of sequences, not an engine's steps: load without trace=.")
        self.model = model
        self.tokenizer = tokenizer
        self._prompts = Prompts(model, tokenizer)
        self._end_tokens = forward.end_tokens(model, tokenizer)
        self._groups = None
        if group_size is not None:
            if getattr(model, "moeflow", None) is None:
                raise ConfigError("group_size is for models of load_moe, whose experts are fetched. Leave it out.")
            self._groups = StepGroups(model, group_size, regrouping=regrouping)
        max_positions = None
        if budget_bytes is None:
            budget_bytes = _AUTO_KV_BYTES
            if self._prompts.context is not None:
                max_positions = max_batch_size * self._prompts.context
        watching = nullcontext if self._groups is None else self._groups.watching
        self._runner = ModelRunner(model, budget_bytes, max_positions, watching)
        self._slots = self._runner.slots
        self._scheduler = Scheduler(max_batch_size, max_step_tokens, share_prefixes=share_prefixes)
        self._kept = KeptPrefix(self._scheduler.wants, self._slots.free)
        self._requests: dict[str, Request] = {}
        self._unreported: list[StepOutput] = []
        self._names = map("request-{}".format, itertools.count(1))
        self._closed = False
        self._counts = dict.fromkeys(("steps", "passes", "prompt_tokens", "shared_tokens", "new_tokens"), 0)
        self._reasons = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._step_s = 0.0

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether every request has ended and been reported."""
        return not self._requests and not self._unreported

    def add(self, prompt: str | list[int], params: SamplingParams = _DEFAULT_PARAMS, *, id: str | None = None) -> str:
        """Queue a request and return its id.

        A prompt that cannot be run ends that request with "error" in the next step; others are not touched.

        Raises:
            ConfigError: an id that is under way, text where the engine has no tokenizer, or neither text nor token ids.
            ClosedModelError: the engine was closed.
        """
        self._check_open()
        if id is None:
            id = next(name for name in self._names if name not in self._requests)
        if id in self._requests:
            raise ConfigError(f"a request with id {id!r} is under way. Give every request another id.")
        if any(kept.id == id for kept in self._kept.donors()):
            self._kept.drop()  # a slot has one name
        ids = self._prompts.token_ids(prompt, params)
        sequence = Sequence(id, ids, self._prompts.most_new_tokens(ids, params))
        request = self._requests[id] = Request(sequence, params, self.tokenizer)
        try:
            self._prompts.check(ids)
            self._slots.check_possible(sequence.num_positions)
        except ConfigError as error:
            self._report(request, [], "", "error", str(error))
        else:
            self._scheduler.add(sequence)
        return id

    def step(self) -> list[StepOutput]:
        """Run one pass, or one for each group, and return an output for each request that got a token or ended.

        Raises:
            ClosedModelError: the engine or its model was closed.
        """
        self._check_open()
        begin = time.perf_counter()
        pieces = self._scheduler.plan(self._admit, self._share, self._kept.donors)
        if pieces:
            self._counts["steps"] += 1
            for passed in [pieces] if self._groups is None else self._groups.split(pieces):
                self._counts["passes"] += 1
                for computed in self._runner.run(passed):
                    self._advance(*computed)
            self._kept.drop_unwanted()
            step_s = time.perf_counter() - begin
            self._step_s += step_s
            if self._groups is not None:
                self._groups.finish(step_s)
        reported, self._unreported = self._unreported, []
        return reported

    def cancel(self, id: str) -> bool:
        """End a request with the tokens it has; return False where none of this id is under way."""
        if id not in self._requests:
            return False
        self._end(self._requests[id], [], "", "cancelled")
        return True

    def generate(
        self,
        prompts: Sequential[str | list[int]],
        params: SamplingParams | Sequential[SamplingParams] = _DEFAULT_PARAMS,
    ) -> list[Completion]:
        """Run prompts to their ends and return their completions in the same order.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} params for {len(prompts)} prompts: give one, or one for each.")
        ids, completions = [], {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.append(self.add(prompt, one))
            for output in self._until(ids):
                if output.completion is not None:
                    completions[output.id] = output.completion
        finally:
            self._forget(ids)
        return [completions[id] for id in ids]

    def stream(self, prompt: str | list[int], params: SamplingParams = _DEFAULT_PARAMS) -> Iterator[str]:
        """Run one request and yield its text as it comes; closing the iterator early cancels the request.

        Raises:
            MoeflowError: it ended in an error, for the reason in the message.
        """
        id = self.add(prompt, params)
        try:
            for output in self._until([id]):
                if output.text:
                    yield output.text
                if output.completion is not None and output.completion.finish_reason == "error":
                    raise MoeflowError(output.completion.error)
        finally:
            self._forget([id])

    def stats(self) -> dict[str, Any]:
        """Return what has happened since the engine was made, with units in the names."""
        return {
            **self._counts,
            "retries": self._runner.num_retries,
            "step_s": self._step_s,
            "waiting": len(self._scheduler.waiting),
            "running": len(self._scheduler.running),
            "finished": dict(self._reasons),
            "kv_budget_bytes": self._slots.budget_bytes,
            "kv_used_bytes": self._slots.used_bytes,
            "kv_peak_bytes": self._slots.peak_bytes,
            "kv_position_bytes": self._slots.position_bytes,
            "regrouping": None if self._groups is None else asdict(self._groups.stats),
        }

    def check_integrity(self) -> None:
        """Assert that slots belong to running sequences and the kept one, and that their bytes are right."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        holders = [*running, *self._kept.donors()]
        assert len(holders) == len(self._slots), f"{len(self._slots)} slots for {len(holders)} sequences"
        for sequence in holders:
            assert self._slots[sequence.id].num_positions == sequence.num_positions, f"{sequence.id} has another's slot"
        assert len(running) + len(waiting) == len(self._requests), "a request neither waits nor runs"
        assert {*running, *waiting} == {request.sequence for request in self._requests.values()}
        self._slots.check_integrity()

    def close(self) -> None:
        """Cancel what is under way and release its memory. The model stays as it was."""
        for id in list(self._requests):
            self.cancel(id)
        self._unreported.clear()
        if self._groups is not None:
            self._groups.close()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedModelError("this engine was closed: make another.")

    def _admit(self, sequence: Sequence) -> bool:
        try:
            if self._slots.allocate(sequence.id, sequence.num_positions):
                return True
        except RuntimeError as error:  # there is less memory than the budget allows
            if not self._kept.donors() and not self._scheduler.running:
                self._end(self._requests[sequence.id], [], "", "error", f"no memory for keys and values: {error}")
        return self._kept.drop() and self._admit(sequence)

    def _share(self, donor: Sequence, receiver: Sequence, num_tokens: int) -> None:
        self._slots[receiver.id].copy_from(self._slots[donor.id], num_tokens)
        self._counts["shared_tokens"] += num_tokens

    def _advance(self, piece: Piece, logits: torch.Tensor | None, error: str | None) -> None:
        """Record a computed piece, and sample the next token where it ends the prompt or decodes."""
        sequence = piece.sequence
        request = self._requests[sequence.id]
        if error is not None:
            self._end(request, [], "", "error", error)
            return
        in_prompt = not sequence.decoding
        sequence.num_computed += len(piece.tokens)
        self._counts["prompt_tokens"] += len(piece.tokens) * in_prompt
        if logits is None:
            return
        try:
            token_id, text, reason = request.choose(logits, self._end_tokens)
        except RuntimeError as error:
            self._end(request, [], "", "error", f"no token could be chosen from the model's logits: {error}")
            return
        self._counts["new_tokens"] += 1
        if reason is None:
            self._unreported.append(StepOutput(sequence.id, [token_id], text, None))
        else:
            self._end(request, [token_id], text, reason)

    def _end(self, request: Request, token_ids: list[int], text: str, reason: str, error: str | None = None) -> None:
        """Take a request out of the schedule, free its slot unless another may share it, and report it."""
        sequence = request.sequence
        if self._scheduler.remove(sequence):
            if reason in ("stop", "length"):
                self._kept.offer(sequence)
            else:
                self._slots.free(sequence.id)
        self._kept.drop_unwanted()
        self._report(request, token_ids, text, reason, error)

    def _report(self, request: Request, token_ids: list[int], text: str, reason: str, error: str | None) -> None:
        rest, completion = request.finish(reason, error)
        del self._requests[completion.id]
        if self._groups is not None:
            self._groups.forget(completion.id)
        self._reasons[reason] += 1
        self._unreported.append(StepOutput(completion.id, token_ids, text + rest, completion))

    def _until(self, ids: list[str]) -> Iterator[StepOutput]:
        """Step until these requests have ended and yield their outputs; those of others wait for the next step()."""
        left, wanted, others = set(ids), set(ids), []
        try:
            while left:
                for output in self.step():
                    if output.id not in wanted:
                        others.append(output)
                        continue
                    if output.completion is not None:
                        left.discard(output.id)
                    yield output
                if not any(id in self._requests for id in left):
                    return  # another caller of step() was told the end
        finally:
            self._unreported = others + self._unreported

    def _forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that are under way, and report none of them."""
        for id in ids:
            self.cancel(id)
        self._unreported = [output for output in self._unreported if output.id not in ids]
