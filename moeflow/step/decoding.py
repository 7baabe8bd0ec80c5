"""Lets a model decode by its step programs where a call asks for nothing else; any other call is the model's own."""

import logging
import weakref
from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from moeflow.errors import MoeflowError
from moeflow.hf.passes.decode_call import DecodeCall, OutputMaker, decode_call, refusal, run_calls_by
from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.programs import StepPrograms

_log = logging.getLogger(__name__)


class StepDecoding:
    """Decode steps of one model: its program is captured at the first, and runs from then on.

    Args:
        model: loaded, with its runtime.

    Attributes:
        programs: of the model.
        num_steps: that a program ran.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_steps = 0
        self._refused: str | None = None  # of the last call that was not read, before the first native step
        self._model = weakref.ref(model)
        self._runtime: ExpertRuntime = model.moeflow  # type: ignore[assignment]  # transformers types it as a module
        self.programs = StepPrograms(self._runtime)
        self._outputs = OutputMaker()
        if GrowingCache.of_model(model) is None:
            self.programs.reason = f"{type(model).__name__} keeps other state than keys and values"
        else:
            run_calls_by(model, self._run, self._outputs.learn)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all native steps by kind of instruction; empty before the first."""
        total: Counter[str] = Counter()
        for runner in self.programs:
            total.update(runner.seconds)
        return dict(total)

    def as_dict(self) -> dict[str, Any]:
        """Return the mode ("native" once a step ran so), why not where it never will, and the steps run natively."""
        mode = "native" if self.num_steps else "python"
        reason = self.programs.reason if self.num_steps else self.programs.reason or self._refused
        return {"mode": mode, "reason": reason, "steps": self.num_steps}

    def text(self) -> str:
        """Return the programs as lines; empty before the first step."""
        return "\n\n".join(runner.bound.program.text() for runner in self.programs)

    def _run(self, kwargs: dict[str, Any]) -> Any:
        """Run a call as a step; return its output, or None where the model must run it itself."""
        model = self._model()
        if self.programs.reason is not None or model is None or not self._outputs.knows or model.training:
            return None
        call = decode_call(model, kwargs)
        if call is None and not self.num_steps:
            self._refused = refusal(kwargs) or self._refused
        return None if call is None else self._runtime.turns.run(self._step, model, call)

    def _step(self, model: PreTrainedModel, call: DecodeCall) -> Any:
        runner = self.programs.runner(model, 1)
        if runner is None or not runner.bound.takes(call.cache.states(runner.bound.program.state_names)):
            return None
        self._runtime.begin_forward(1, 1, continues=True, token_ids=call.input_ids)
        try:
            logits = runner.step(call.cache, call.input_ids, call.position, call.first).clone()
        except (RuntimeError, TypeError, ValueError, LookupError) as error:  # of torch, or of the model's own code
            if isinstance(error, MoeflowError):
                raise
            self.programs.reason = f"a step as a program failed ({type(error).__name__}: {str(error)[:200]})"
            _log.warning("%s decodes by its own code: %s", type(model).__name__, self.programs.reason)
            return None  # the cache is as before
        call.cache.advance(runner.bound.kept_layers)
        self.num_steps += 1
        return self._outputs.make(logits, call.cache)
