"""Lets a model decode by its step programs where a call asks for nothing else; any other call is the model's own."""

import logging
import threading
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.dtypes import serial_copy
from moeflow.errors import MoeflowError
from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.hf.passes.decode_call import (
    OutputMaker,
    decode_call,
    has_growing_cache,
    may_decode,
    refusal,
    run_calls_by,
)
from moeflow.hf.passes.forward import ForwardPass
from moeflow.hf.passes.step_rows import EXACT_ROWS, SpanRows, StepRows
from moeflow.kernels.cpu.step import StepIndexError
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.programs import StepPrograms
from moeflow.step.runner import StepRunner
from moeflow.step.unchanged import ModelState

_log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)
"""Rows that programs have; a step of any other number runs the next larger one, with dead rows."""


class StepDecoding:
    """Decode steps of one model, which owns them: its program is captured at the first, and runs from then on.

    Args:
        model: loaded, with its runtime.

    Attributes:
        programs: of the model.
        num_steps: that a program ran.
        drafts: of the model's `generate`; None for none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_steps = 0
        self.drafts: Any = None
        self._here = threading.local()
        self._refused: str | None = None  # of the last call that was not read, before the first native step
        self._model = weakref.ref(model)
        self._runtime: ExpertRuntime = model.moeflow  # type: ignore[assignment]  # transformers types it as a module
        self._outputs = OutputMaker()
        self._last: StepRunner | None = None  # that ran a step
        has_positions = GrowingCache.of_model(model) is not None
        if has_positions:
            run_calls_by(model, self._run, self._learn)
        self.programs = StepPrograms(self._runtime, ModelState(model))
        model._step_decoding = self  # type: ignore[assignment]  # an attribute of ours
        self._runtime.step_of = weakref.ref(self)  # no circle: a model without a name releases its memory at once
        if not has_positions:
            self.programs.reason = f"{type(model).__name__} keeps other state than keys and values"

    @property
    def steps_here(self) -> int:
        """Steps that a program ran in this thread."""
        return getattr(self._here, "num_steps", 0)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all native steps by kind of instruction; empty before the first."""
        total: Counter[str] = Counter()
        for runner in self.programs:
            total.update(runner.seconds)
        return dict(total)

    def as_dict(self) -> dict[str, Any]:
        """Return the mode ("native" once a step ran so), why not where none does, and the steps run natively."""
        mode, found = "native" if self.num_steps else "python", self.programs
        reason = found.reason or found.changed or next((found.reasons[rows] for rows in sorted(found.reasons)), None)
        if not self.num_steps:
            reason = reason or self._refused
        return {"mode": mode, "reason": reason, "steps": self.num_steps}

    def text(self) -> str:
        """Return the programs as lines; empty before the first step."""
        return "\n\n".join(runner.bound.program.text() for runner in self.programs)

    def routes(self) -> np.ndarray:
        """Return the experts of the last step's rows: [rows, L, K] ids, of which E or more stands for none."""
        assert self._last is not None, "no step ran natively"
        return self._last.routes()

    def last_hidden(self) -> torch.Tensor | None:
        """Return the normed hidden states of the last step's rows, [rows, H]; None where its program tells none."""
        assert self._last is not None, "no step ran natively"
        return self._last.last_hidden()

    def prepare(self, num_rows: int = 1) -> None:
        """Capture the program of so many rows now, or take it from the disk, in place of at the first step.

        Raises:
            ExpertReadError: an expert could not be read. The first step tries again.
            ClosedModelError: the runtime was closed.
        """
        model = self._model()
        if model is not None and self.programs.reason is None:
            self._runtime.turns.run(capture_gate.run, self.programs.runner, model, num_rows)

    def takes_span(self, num_new: int) -> bool:
        """Whether a step of several new tokens of one sequence has a program, which is made now or taken from the disk.

        Raises:
            ExpertReadError: an expert could not be read.
            ClosedModelError: the runtime was closed.
        """
        model = self._model()
        if model is None or num_new > EXACT_ROWS:
            return False

        def look() -> bool:
            runner = self.programs.runner(model, next(size for size in SIZES if num_new <= size))
            return runner is not None and self.programs.takes_spans(model, runner)

        return self._runtime.turns.run(capture_gate.run, look)

    def describe(self) -> dict[str, Any]:
        """Prepare the program of one sequence and describe it.

        Returns:
            "reason" why there is none; or "instructions" by kind, "memory_bytes" that it takes beside the weights,
            "from_disk", and "text". All of them else None.
        """
        found = self.programs
        self.prepare()
        runner = next(iter(found), None)
        about = dict.fromkeys(("instructions", "memory_bytes", "from_disk", "text"))
        if runner is None:
            return {"reason": found.reason or found.reasons.get(1) or found.changed, **about}
        bound = runner.bound
        kinds = Counter(one.kind for one in bound.program.body)
        return {
            "reason": None,
            "instructions": dict(kinds.most_common()),
            "memory_bytes": bound.num_bytes,
            "from_disk": found.was_kept[1],
            "text": bound.program.text(),
        }

    def _learn(self, output: Any) -> None:
        self._outputs.learn(output)
        self.programs.look_closer()

    def _run(self, kwargs: dict[str, Any]) -> Any:
        """Run a call as a step; return its output, or None where the model must run it itself."""
        if self.programs.reason is not None or not self._outputs.knows or torch.compiler.is_dynamo_compiling():
            return None
        made = None
        if has_growing_cache(kwargs):
            made = self._runtime.turns.run(capture_gate.run, self._call, kwargs)
        if made is None and not self.num_steps and not torch.compiler.is_compiling():
            self._refused = refusal(kwargs) or self._refused
        return made

    def _call(self, kwargs: dict[str, Any]) -> Any:
        model = self._model()
        call = None if model is None else decode_call(model, kwargs)
        if call is None:
            return None
        num_sequences, num_new = call.input_ids.shape
        begun = ForwardPass(num_sequences, num_new, True, call.input_ids, call.attention_mask, call.cache)
        logits = self.step(call.rows, begun)
        if logits is None:
            return None
        logits = logits.view(num_sequences, num_new, -1)
        return self._outputs.make(logits[:, -call.num_logits :], call.cache)

    def step(self, rows: StepRows, begun: ForwardPass) -> torch.Tensor | None:
        """Run a step by its program, in the turn of the caller's pass.

        Args:
            rows: its sequences.
            begun: the step as the runtime and its observers are told.

        Returns:
            Logits [rows, 1, V]; None where the model must run it itself, and nothing was done.

        Raises:
            ExpertReadError: an expert could not be read. The step may be run again.
            ClosedModelError: the runtime was closed.
        """
        return capture_gate.run(self._step, rows, begun)

    def _step(self, rows: StepRows, begun: ForwardPass) -> torch.Tensor | None:
        model, num_rows = self._model(), len(rows.input_ids)
        size = next((size for size in SIZES if num_rows <= size), None)
        if model is None or model.training or size is None or not may_decode():
            return None
        if self._runtime.parallel is not None:
            return None  # a capture and its check would meet the other ranks in rounds that they do not run
        runner = self.programs.runner(model, size)
        if runner is None or not runner.takes(rows):
            return None
        if isinstance(rows.kept, SpanRows) and not self.programs.takes_spans(model, runner):
            return None
        self._runtime.begin_pass(begun)
        try:
            logits = serial_copy(runner.step(rows))
        except StepIndexError:  # a token that is not in the vocabulary: the model's own code refuses it
            return None
        except (RuntimeError, TypeError, ValueError, LookupError) as error:  # of torch, or of the model's own code
            if isinstance(error, MoeflowError):
                raise
            self.programs.reason = f"a step as a program failed ({type(error).__name__}: {str(error)[:200]})"
            _log.warning("%s decodes by its own code: %s", type(model).__name__, self.programs.reason)
            return None  # what is kept is as before
        self.num_steps += 1
        self._here.num_steps = self.steps_here + 1
        self._last = runner
        return logits
