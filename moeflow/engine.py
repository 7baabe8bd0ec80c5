"""Many requests on one model: each step runs one pass over the new tokens of all of them.

The place where tensors meet the schedule: it admits requests, runs packed passes, samples, and says what came of each.
"""

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Sequential
from contextlib import nullcontext
from dataclasses import asdict

import torch

from moeflow import hf
from moeflow.config import MemorySize, parse_memory
from moeflow.engine_groups import StepGroups
from moeflow.engine_request import Completion, Progress, Request
from moeflow.errors import BudgetError, ClosedModelError, ConfigError, ExpertReadError, MoeflowError
from moeflow.key_values import KeyValueSlots
from moeflow.packed_attention import PackedCache, Segment
from moeflow.recorder import TraceRecorder
from moeflow.sampling import SamplingParams
from moeflow.sequences import Piece, Schedule, Sequence

_AUTO_BYTES = 2 << 30  # of keys and values
_DEFAULT = SamplingParams()


class Engine:
    """Runs requests on a model, as many at once as its limits allow.

    Args:
        model: of `load_moe`, or any transformers causal LM whose cache holds keys and values only.
        tokenizer: the model's; None where prompts are token ids and no text is wanted.
        max_batch_size: most sequences that run at once.
        max_step_tokens: most tokens in one pass; prompts are cut to fit beside the tokens of those that decode.
        kv_memory: what keys and values of all sequences may take: bytes, "2GiB", or "auto" (what max_batch_size
            sequences of the model's whole context take, at most 2 GiB). It is taken as sequences come.
        share_prefixes: whether equal beginnings of prompts under way are computed once.
        group_size: most sequences that decode in one pass, where that is to be less than max_batch_size: a step then
            takes several passes. None: one pass for all, in which every expert is fetched once, the fastest there is.
        regrouping: whether the token scheduler chooses the groups, so that they activate few experts; else they are in
            the order of arrival. Outputs are the same.

    Raises:
        ConfigError: a limit is no positive number, or kv_memory no size.
        UnsupportedModelError: the model keeps other state than keys and values, or attends in a way of its own.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_batch_size: int = 32,
        max_step_tokens: int = 512,
        kv_memory: MemorySize = "auto",
        share_prefixes: bool = True,
        group_size: int | None = None,
        regrouping: bool = True,
    ):
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
        hf.check_key_value_cache(model)
        observers = getattr(getattr(model, "moeflow", None), "observers", ())
        if any(isinstance(observer, TraceRecorder) for observer in observers):
            raise ConfigError("a trace records whole batches of sequences, not an engine's steps: load without trace=.")
        self.model = model
        self.tokenizer = tokenizer
        self._context = hf.context_positions(model)
        self._end_tokens = hf.end_tokens(model)
        if tokenizer is not None and tokenizer.eos_token_id is not None:  # where chat models name their end of turn
            self._end_tokens |= {tokenizer.eos_token_id}
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        self._cache = PackedCache()
        self._cache.learn(model)
        self._slots = KeyValueSlots(self._cache.shapes, 0)
        if budget_bytes is None:
            budget_bytes = _AUTO_BYTES
            if self._context is not None:
                budget_bytes = min(max_batch_size * self._context * self._slots.position_bytes, _AUTO_BYTES)
        self._slots.budget_bytes = budget_bytes
        self._schedule = Schedule(max_batch_size, max_step_tokens, share_prefixes=share_prefixes)
        self._groups = None
        if group_size is not None:
            if getattr(model, "moeflow", None) is None:
                raise ConfigError("group_size is for models of load_moe, whose experts are fetched. Leave it out.")
            self._groups = StepGroups(model, group_size, regrouping=regrouping)
        self._requests: dict[str, Request] = {}
        self._unreported: list[Progress] = []
        self._names = map("request-{}".format, itertools.count(1))
        self._closed = False
        self._counts = dict.fromkeys(("steps", "passes", "prompt_tokens", "shared_tokens", "new_tokens", "retries"), 0)
        self._reasons = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._step_s = 0.0

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether every request has ended and been reported."""
        return not self._requests and not self._unreported

    def add(self, prompt: str | list[int], params: SamplingParams = _DEFAULT, *, id: str | None = None) -> str:
        """Let a request wait for its turn, and return its id.

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
        if not isinstance(prompt, (str, list, tuple)):
            raise ConfigError(f"a prompt is text or a list of token ids, this is a {type(prompt).__name__}.")
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ConfigError("this engine has no tokenizer: give token ids and no stop strings, or a tokenizer.")
        ids = list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        most = params.max_new_tokens
        if self._context is not None:
            most = min(most, self._context - len(ids) + 1)
        request = Request(Sequence(id, ids, most), params, self.tokenizer)
        self._requests[id] = request
        error = self._refuse(request.sequence)
        if error is None:
            self._schedule.add(request.sequence)
        else:
            self._report(request, [], "", "error", error)
        return id

    def step(self) -> list[Progress]:
        """Run one pass, or one for each group, and return what it brought to each request that got or ended something.

        Raises:
            ClosedModelError: the engine or its model was closed.
        """
        self._check_open()
        begin = time.perf_counter()
        pieces = self._schedule.plan(self._admit, self._share)
        if pieces:
            self._counts["steps"] += 1
            for passed in [pieces] if self._groups is None else self._groups.split(pieces):
                self._counts["passes"] += 1
                for piece, logits in self._run(passed):
                    self._advance(piece, logits)
            step_s = time.perf_counter() - begin
            self._step_s += step_s
            if self._groups is not None:
                self._groups.finish(step_s)
        reported, self._unreported = self._unreported, []
        return reported

    def cancel(self, id: str) -> bool:
        """End a request with what it has; False where none of this id is under way."""
        if id not in self._requests:
            return False
        self._end(self._requests[id], [], "", "cancelled")
        return True

    def generate(
        self,
        prompts: Sequential[str | list[int]],
        params: SamplingParams | Sequential[SamplingParams] = _DEFAULT,
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
            for progress in self._until(ids):
                if progress.completion is not None:
                    completions[progress.id] = progress.completion
        finally:
            self._forget(ids)
        return [completions[id] for id in ids]

    def stream(self, prompt: str | list[int], params: SamplingParams = _DEFAULT) -> Iterator[str]:
        """Run one request and yield its text as it comes; what is closed early is cancelled.

        Raises:
            MoeflowError: it ended in an error, for the reason in the message.
        """
        id = self.add(prompt, params)
        try:
            for progress in self._until([id]):
                if progress.text:
                    yield progress.text
                if progress.completion is not None and progress.completion.finish_reason == "error":
                    raise MoeflowError(progress.completion.error)
        finally:
            self._forget([id])

    def stats(self) -> dict:
        """Return what has happened since the engine was made, with units in the names."""
        return {
            **self._counts,
            "step_s": self._step_s,
            "waiting": len(self._schedule.waiting),
            "running": len(self._schedule.running),
            "finished": dict(self._reasons),
            "kv_budget_bytes": self._slots.budget_bytes,
            "kv_used_bytes": self._slots.used_bytes,
            "kv_peak_bytes": self._slots.peak_bytes,
            "kv_position_bytes": self._slots.position_bytes,
            "regrouping": None if self._groups is None else asdict(self._groups.stats),
        }

    def check_integrity(self) -> None:
        """Assert that every running sequence, and nobody else, has a slot, and that bytes are counted rightly."""
        running, waiting = self._schedule.running, self._schedule.waiting
        assert len(running) == len(self._slots), f"{len(self._slots)} slots for {len(running)} running sequences"
        for sequence in running:
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

    def _refuse(self, sequence: Sequence) -> str | None:
        """Say why a prompt cannot be run; None where it can."""
        ids = sequence.prompt_ids
        if not ids:
            return "the prompt is empty: give at least one token."
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < self._vocab_size]
        if wrong:
            return f"the prompt has {wrong[0]!r}, which is no token id: they are 0 to {self._vocab_size - 1}."
        if self._context is not None and len(ids) > self._context:
            return (
                f"the prompt has {len(ids):,} tokens, the model's context {self._context:,} positions. Shorten the "
                "prompt, or take a model with a longer context."
            )
        try:
            self._slots.check_possible(sequence.num_positions)
        except BudgetError as error:
            return str(error)
        return None

    def _admit(self, sequence: Sequence) -> bool:
        try:
            return self._slots.allocate(sequence.id, sequence.num_positions)
        except RuntimeError as error:  # there is less memory than the budget allows
            if not self._schedule.running:
                self._end(self._requests[sequence.id], [], "", "error", f"no memory for keys and values: {error}")
            return False

    def _share(self, donor: Sequence, receiver: Sequence, num_tokens: int) -> None:
        self._slots[receiver.id].copy_from(self._slots[donor.id], num_tokens)
        self._counts["shared_tokens"] += num_tokens

    def _run(self, pieces: list[Piece]) -> list[tuple[Piece, torch.Tensor | None]]:
        """Compute the pieces; where that fails, each alone, so that only those fail which cannot be computed."""
        failed = (ExpertReadError, OSError, RuntimeError)
        try:
            return self._forward(pieces)
        except failed:
            self._counts["retries"] += 1
        done = []
        for piece in pieces:
            try:
                done += self._forward([piece])
            except failed as error:
                request = self._requests[piece.sequence.id]
                self._end(request, [], "", "error", f"{type(error).__name__}: {error}")
        return done

    def _forward(self, pieces: list[Piece]) -> list[tuple[Piece, torch.Tensor | None]]:
        segments, tokens, positions, keep = [], [], [], []
        for sequence, new, samples in pieces:
            segment = Segment(self._slots[sequence.id], sequence.num_computed, len(new))
            segments.append(segment)
            tokens += new
            positions += range(segment.start, segment.end)
            if samples:
                keep.append(len(tokens) - 1)
        ids, positions, places = (
            torch.tensor(values, dtype=torch.long, device=self.model.device)
            for values in (tokens, positions, keep or [len(tokens) - 1])
        )
        watched = nullcontext() if self._groups is None else self._groups.watching(pieces)
        with torch.no_grad(), watched, self._cache.running(self.model, segments):
            logits = iter(hf.packed_forward(self.model, ids[None], positions[None], self._cache, places))
        return [(piece, next(logits) if piece.samples else None) for piece in pieces]

    def _advance(self, piece: Piece, logits: torch.Tensor | None) -> None:
        """Enter what was computed, and the token that it leads to."""
        sequence = piece.sequence
        in_prompt = not sequence.decoding
        sequence.num_computed += len(piece.tokens)
        self._counts["prompt_tokens"] += len(piece.tokens) * in_prompt
        if logits is None:
            return
        request = self._requests[sequence.id]
        try:
            sampled = request.sampler.sample(logits, sequence.prompt_ids, sequence.token_ids)
        except RuntimeError as error:
            self._end(request, [], "", "error", f"no token could be chosen from the model's logits: {error}")
            return
        sequence.token_ids.append(sampled.token_id)
        self._counts["new_tokens"] += 1
        if request.logprobs is not None:
            request.logprobs.append((sampled.logprob, sampled.top))
        text, stopped = "", sampled.token_id in self._end_tokens and not request.params.ignore_eos
        if not stopped and request.stops is not None:
            text, stopped = request.stops.push(sampled.token_id)
        if stopped:
            self._end(request, [sampled.token_id], text, "stop")
        elif len(sequence.token_ids) == sequence.max_new_tokens:
            self._end(request, [sampled.token_id], text, "length")
        else:
            request.text += text
            self._unreported.append(Progress(sequence.id, [sampled.token_id], text, None))

    def _end(self, request: Request, token_ids: list[int], text: str, reason: str, error: str | None = None) -> None:
        """Take a request out of the schedule, free its slot and report it."""
        if self._schedule.remove(request.sequence):
            self._slots.free(request.sequence.id)
        self._report(request, token_ids, text, reason, error)

    def _report(self, request, token_ids, text, reason, error) -> None:
        sequence = request.sequence
        if request.stops is not None:
            text += request.stops.finish()
        del self._requests[sequence.id]
        if self._groups is not None:
            self._groups.forget(sequence.id)
        self._reasons[reason] += 1
        completion = Completion(
            sequence.id,
            sequence.prompt_ids,
            sequence.token_ids,
            request.text + text,
            reason,
            error,
            request.logprobs,
        )
        self._unreported.append(Progress(sequence.id, token_ids, text, completion))

    def _until(self, ids: list[str]) -> Iterator[Progress]:
        """Step until these have ended, and yield what they got; what others got is kept for the next step()."""
        left, wanted, others = set(ids), set(ids), []
        try:
            while left:
                for progress in self.step():
                    if progress.id not in wanted:
                        others.append(progress)
                        continue
                    if progress.completion is not None:
                        left.discard(progress.id)
                    yield progress
                if not any(id in self._requests for id in left):
                    return  # whoever called step() meanwhile was told the end
        finally:
            self._unreported = others + self._unreported

    def _forget(self, ids: list[str]) -> None:
        """Cancel what is still under way of these, and report none of them."""
        for id in ids:
            self.cancel(id)
        self._unreported = [progress for progress in self._unreported if progress.id not in ids]
