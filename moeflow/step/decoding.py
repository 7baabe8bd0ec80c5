"""Lets a model decode by its step programs where a call asks for nothing else; any other call is the model's own."""

import weakref
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.hf.passes.decode_call import OutputMaker, decode_call, has_growing_cache, run_calls_by
from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.kernels.cpu.step import StepIndexError
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.programs import StepPrograms
from moeflow.step.unchanged import ModelState


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
        self._model = weakref.ref(model)
        self._runtime: ExpertRuntime = model.moeflow  # type: ignore[assignment]  # transformers types it as a module
        self._outputs = OutputMaker()
        keeps_more = GrowingCache.of_model(model) is None
        if not keeps_more:
            run_calls_by(model, self._run, self._learn)
        self.programs = StepPrograms(self._runtime, ModelState(model))
        if keeps_more:
            self.programs.reason = f"{type(model).__name__} keeps other state than keys and values"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all native steps by kind of instruction; empty before the first."""
        total: Counter[str] = Counter()
        for runner in self.programs:
            total.update(runner.seconds)
        return dict(total)

    def as_dict(self) -> dict[str, Any]:
        """Return the mode ("native" once a step ran so), why not where it does not, and the steps run natively."""
        mode = "native" if self.num_steps else "python"
        return {"mode": mode, "reason": self.programs.reason or self.programs.changed, "steps": self.num_steps}

    def text(self) -> str:
        """Return the programs as lines; empty before the first step."""
        return "\n\n".join(runner.bound.program.text() for runner in self.programs)

    def _learn(self, output: Any) -> None:
        self._outputs.learn(output)
        self.programs.look_closer()

    def _run(self, kwargs: dict[str, Any]) -> Any:
        """Run a call as a step; return its output, or None where the model must run it itself."""
        model = self._model()
        if self.programs.reason is not None or model is None or not self._outputs.knows or model.training:
            return None
        if torch.compiler.is_dynamo_compiling() or not has_growing_cache(kwargs):
            return None
        return self._runtime.turns.run(capture_gate.run, self._step, model, kwargs)

    def _step(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> Any:
        call = decode_call(model, kwargs)
        if call is None:
            return None
        runner = self.programs.runner(model, 1)
        if runner is None or not call.cache.fits(runner.bound.kept_layers, 1):
            return None
        self._runtime.begin_forward(1, 1, continues=True, token_ids=call.input_ids)
        try:
            logits = runner.step(call.cache, call.input_ids, call.position, call.first).clone()
        except StepIndexError:  # a token that is not in the vocabulary: the model's own code refuses it
            return None
        call.cache.advance(runner.bound.kept_layers)
        self.num_steps += 1
        return self._outputs.make(logits, call.cache)
