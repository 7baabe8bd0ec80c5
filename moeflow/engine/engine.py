"""Continuous batching: each step runs one pass over the new tokens of all requests under way.

Knows requests, the scheduler and the model runner. Knows nothing of tensors' layout, files or terminals.
"""

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Sequential
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.kv_cache.budget import step_tokens
from moeflow.engine.kv_cache.disk.kept_disk import disk_for
from moeflow.engine.kv_cache.kv_format import kv_format_of
from moeflow.engine.kv_cache.policies.choosing import policy_of
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.prompts import Prompts
from moeflow.engine.regrouping.step_groups import StepGroups
from moeflow.engine.request import Completion, Outputs, Request, StepOutput
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.scheduler import Scheduler, check_priority
from moeflow.engine.sequence import Piece
from moeflow.engine.speculation.of_engine import speculation_for
from moeflow.engine.speculation.options import SpeculationOption
from moeflow.engine.whole_answers import WholeAnswers
from moeflow.errors import ClosedModelError, ConfigError, ForkedProcessError, MoeflowError
from moeflow.fork import tell_of_forks
from moeflow.hf.passes import forward
from moeflow.memory_size import MemorySize
from moeflow.policy.key_value_policies import KeyValuePolicyOption
from moeflow.trace.recorder import check_no_trace
from moeflow.turns import Turns, in_turn

_DEFAULT_PARAMS = SamplingParams()


class Engine:
    """Runs requests on a model, as many at once as its limits allow.

    Args:
        model: of `load_moe`, or any transformers causal LM whose cache holds keys and values only.
        tokenizer: the model's; None where prompts are token ids and no text is wanted.
        max_batch_size: the largest number of sequences that run at once.
        max_step_tokens: most tokens in one pass, where the model's plan has no fewer; prompts are cut to fit in.
        kv_memory: most bytes of all sequences' keys and values, taken as they come and grow: a number, "2GiB", or
            "auto" (what `load_moe` kept for them, else 2 GiB; at most what max_batch_size whole contexts take).
        share_prefixes: whether equal beginnings are computed once: of prompts under way, and of what ended requests
            have left, which stays in kv_memory until its room is needed.
        max_waiting: most requests beyond max_batch_size; None for any number.
        group_size: the largest number of sequences that decode in one pass; below max_batch_size a step takes several
            passes. None: one pass for all, in which every expert is fetched once a step.
        regrouping: whether groups are chosen to activate few experts, else by arrival. Outputs are the same.
        jump_forward: whether tokens that a grammar forces in a row take one pass together. Outputs are the same.
        speculation: whether steps also compute tokens that may come next, where that pays: "auto" (as the model was
            loaded), None, or a dict of `SpeculationOptions`' fields. Outputs are the same.
        kv_format: of keys and values: "auto" (the model's dtype), "int8", "int4"; None: as the model was loaded.
        kv_policy: of long contexts, lossy: "auto" (as the model was loaded), None, "sinks", "heavy_hitters", "pages",
            or a dict of a name and its sizes. Without native steps and drafts; some share no prefixes.
        kept_folder: where prefixes that leave kv_memory stay, for restarts too, for one engine a model; None: nowhere.
        kept_disk: most bytes of their files; those that were not used for the longest time go first.

    Raises:
        ConfigError: an option is not allowed or not possible, or the model's stop strings need a tokenizer.
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
        max_waiting: int | None = None,
        group_size: int | None = None,
        regrouping: bool = True,
        jump_forward: bool = True,
        speculation: SpeculationOption = "auto",
        kv_format: str | None = None,
        kv_policy: KeyValuePolicyOption = "auto",
        kept_folder: str | Path | None = None,
        kept_disk: MemorySize = "4GiB",
    ) -> None:
        policy = policy_of(kv_policy, model)
        share_prefixes = share_prefixes and not (policy and policy.forgets)
        most_tokens = step_tokens(max_step_tokens, max_batch_size, model)
        self._scheduler = Scheduler(max_batch_size, most_tokens, share_prefixes=share_prefixes, max_waiting=max_waiting)
        check_no_trace(model)
        self.model, self.tokenizer = model, tokenizer
        self._prompts = Prompts(model, tokenizer)
        self._end_tokens, self._jump_forward = forward.end_tokens(model, tokenizer), jump_forward
        self._groups = None if group_size is None else StepGroups(model, group_size, regrouping=regrouping)
        self._runner = self._make_runner(kv_memory, kv_format_of(kv_format, model), policy)
        limit = self._scheduler.max_step_tokens * (self._groups is None)
        self._speculation = speculation_for(speculation, model, tokenizer, self._runner, limit)
        self._memory = self._runner.memory
        self._memory.keeps = share_prefixes
        if kept_folder is not None:
            self._memory.keep_on_disk(disk_for(kept_folder, kept_disk, self._runner.fingerprint))
        self._requests: dict[str, Request] = {}
        self._outputs = Outputs()  # claimed by generate() and stream(), or for step()
        self._names = map("request-{}".format, itertools.count(1))
        self._refusal: MoeflowError | None = None
        self._turns = Turns()
        tell_of_forks(self)
        self._counts = dict.fromkeys(("steps", "passes", "prompt_tokens", "new_tokens"), 0)
        self._reasons, self._step_s = dict.fromkeys(("stop", "length", "cancelled", "error"), 0), 0.0

    def _make_runner(self, kv_memory: MemorySize, kv_format: str, policy: KeyValuePolicy | None) -> ModelRunner:
        forward.check_key_value_cache(self.model)
        context = self._prompts.context
        max_positions = None if kv_memory != "auto" or context is None else self._scheduler.max_batch_size * context
        watching = nullcontext if self._groups is None else self._groups.watching
        limit = self._scheduler.max_step_tokens
        return ModelRunner(self.model, kv_memory, max_positions, watching, limit, kv_format, policy)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether every request has ended and been reported."""
        return not self._requests and not self._outputs

    @in_turn
    def add(
        self,
        prompt: str | list[int],
        params: SamplingParams = _DEFAULT_PARAMS,
        *,
        id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request and return its id.

        A prompt that cannot be run ends that request with "error" in the next step; others are not touched.

        Args:
            prompt: text or token ids.
            params: what is asked of the answer.
            id: its name; None for a new one.
            priority: -100 to 100; the higher one waits less, and gives way later where memory ends. A level is worth
                100 steps of waiting, so that no request waits for ever.

        Raises:
            ConfigError: an id that is under way, no text or token ids, what needs a tokenizer, a grammar that is none,
                or no priority.
            QueueFullError: max_batch_size + max_waiting requests are under way.
            ClosedModelError: the engine was closed.
        """
        self._check_open()
        check_priority(priority)
        id = self._new_id() if id is None else id
        if id in self._requests:
            raise ConfigError(f"a request with id {id!r} is under way. Give every request another id.")
        self._scheduler.check_place()
        ids = self._prompts.token_ids(prompt, params)
        sequence = self._runner.sequence(id, ids, self._prompts.most_new_tokens(ids, params), priority)
        params = self._prompts.stopping(params)
        request = self._requests[id] = Request(sequence, params, self.tokenizer, self._end_tokens, self._jump_forward)
        try:
            self._prompts.check(ids)
            self._memory.check_possible(sequence.num_positions)
        except ConfigError as error:
            self._report(request, [], "", "error", str(error))
        else:
            self._scheduler.add(sequence)
        return id

    @in_turn
    def step(self) -> list[StepOutput]:
        """Run one pass, or one for each group, and return an output for each request that got a token or ended.

        Those of generate() and stream() in other threads go to these alone.

        Raises:
            ClosedModelError: the engine or its model was closed.
        """
        self._run_step()
        return self._outputs.take()

    def _run_step(self) -> None:
        self._check_open()
        begin = time.perf_counter()
        pieces = self._scheduler.plan(self._memory)
        for sequence, reason in list(self._memory.refused.items()):
            self._end(self._requests[sequence.id], [], "", "error", reason)
        if pieces:
            pieces = self._speculation.extend(pieces)
            num_prompt = sum(len(piece.tokens) for piece in pieces if not piece.sequence.decoding)
            self._counts["steps"] += 1
            for passed in [pieces] if self._groups is None else self._groups.split(pieces):
                self._counts["passes"] += 1
                for computed in self._runner.run(passed):
                    self._advance(*computed)
            self._step_s += (step_s := time.perf_counter() - begin)
            if num_prompt:
                self._memory.speeds.saw_prefill(num_prompt, step_s)
            if self._groups is not None:
                self._groups.finish(step_s)
            self._speculation.finish(pieces, step_s)

    @in_turn
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
        """Run texts or token ids to their ends, with one params or one for each; return completions in their order."""
        return self._whole_answers().generate(prompts, params)

    def stream(self, prompt: str | list[int], params: SamplingParams = _DEFAULT_PARAMS) -> Iterator[str]:
        """Run one request and yield its text as it comes; closing the iterator early cancels the request.

        Raises:
            MoeflowError: it ended in an error, for the reason in the message.
        """
        return self._whole_answers().stream(prompt, params)

    def outputs(self, prompt: str | list[int], params: SamplingParams = _DEFAULT_PARAMS) -> Iterator[StepOutput]:
        """Run one request and yield its outputs, the last one with its completion.

        Closing the iterator early cancels the request; `cancel` ends it, and its last output comes.
        """
        return self._whole_answers().outputs(prompt, params)

    @in_turn
    def stats(self) -> dict[str, Any]:
        """Return what has happened since the engine was made, with units in the names."""
        return {
            **self._counts,
            "step_s": self._step_s,
            "waiting": len(self._scheduler.waiting),
            "running": len(self._scheduler.running),
            "finished": dict(self._reasons),
            **self._memory.stats(),
            **self._runner.stats(),
            "regrouping": None if self._groups is None else asdict(self._groups.stats),
            "speculation": self._speculation.stats(),
        }

    @in_turn
    def save_kept(self, folder: str | Path) -> int:
        """Write the kept keys and values to files of this model in a folder, and return their number of tokens.

        Raises:
            MoeflowError: a file cannot be written, or the engine was closed.
        """
        self._check_open()
        return self._memory.save(Path(folder), self._runner.fingerprint())

    @in_turn
    def load_kept(self, folder: str | Path) -> int:
        """Keep what `save_kept` wrote of this very model, as far as there is room; return the number of tokens.

        What is damaged or of another model is left out, with a warning in the log.
        """
        self._check_open()
        return self._memory.load(Path(folder), self._runner.fingerprint())

    @in_turn
    def check_integrity(self) -> None:
        """Assert that slots belong to running sequences, and that the bytes of all that is held are right."""
        self._scheduler.check_integrity({request.sequence for request in self._requests.values()}, self._memory)
        self._memory.check_integrity()

    @in_turn
    def close(self) -> None:
        """Cancel what is under way and release its memory; call again after an interrupt. The model stays."""
        self._memory.keeps = False
        if not isinstance(self._refusal, ForkedProcessError):
            for id in list(self._requests):
                self.cancel(id)
        self._outputs.clear()
        self._memory.clear()  # also those whose request an interrupt left half ended
        if self._groups is not None:
            self._groups.close()
        self._refusal = ClosedModelError("this engine was closed: make another.")

    def after_fork(self) -> None:
        """Go on in the child of a fork with the requests under way; refuse where another thread was in a step."""
        if not self._turns.renew():
            self._refusal = ForkedProcessError(
                "another thread was in a step of this engine when the process was forked: make another engine here."
            )

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _whole_answers(self) -> WholeAnswers:
        """Return what runs requests to their ends; the engine holds none, so that it is freed at once."""
        return WholeAnswers(self._outputs, self._turns, self._new_id, self.add, self._run_step, self.cancel)

    def _new_id(self) -> str:
        return next(name for name in self._names if name not in self._requests)

    def _advance(self, piece: Piece, logits: torch.Tensor | None, error: str | None) -> None:
        """Record a computed piece, and sample the next token where it ends the prompt or decodes."""
        sequence = piece.sequence
        request = self._requests[sequence.id]
        if error is not None:
            return self._end(request, [], "", "error", error)
        self._counts["prompt_tokens"] += len(piece.tokens) * (sequence.num_computed < len(sequence.prompt_ids))
        request.score(logits)
        sequence.num_computed += len(piece.tokens)
        if logits is None or not piece.samples:
            return
        chosen = request.choose(logits := logits[-1 - len(piece.draft) :], piece.draft)
        self._speculation.judge(piece, logits, chosen)
        self._counts["new_tokens"] += len(chosen.token_ids)
        if chosen.reason is None:
            self._outputs.put(request.output(chosen.token_ids, chosen.text))
        else:
            self._end(request, chosen.token_ids, chosen.text, chosen.reason, chosen.error)

    def _end(self, request: Request, token_ids: list[int], text: str, reason: str, error: str | None = None) -> None:
        """Take a request out of the schedule, keep what it has computed without an error, and report it."""
        sequence = request.sequence
        was_running = self._scheduler.remove(sequence)
        (self._memory.keep if was_running and reason != "error" else self._memory.free)(sequence)
        self._report(request, token_ids, text, reason, error)

    def _report(self, request: Request, token_ids: list[int], text: str, reason: str, error: str | None) -> None:
        rest, completion = request.finish(reason, error)
        del self._requests[completion.id]
        if self._groups is not None:
            self._groups.forget(completion.id)
        self._speculation.forget(completion.id)
        self._reasons[reason] += 1
        self._outputs.put(request.output(token_ids, text + rest, completion))
