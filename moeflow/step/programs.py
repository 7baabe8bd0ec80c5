"""The step programs of one model, one for each number of rows, ready to run."""

import logging
from collections.abc import Iterator

from transformers import PreTrainedModel

from moeflow.errors import UnsupportedModelError
from moeflow.hf import experts_interface
from moeflow.hf.passes.capture import capture
from moeflow.kernels.cpu.library import instruction_set
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.bound import BoundProgram
from moeflow.step.check import difference
from moeflow.step.lower import lower
from moeflow.step.runner import StepRunner
from moeflow.step.unchanged import ModelState

_log = logging.getLogger(__name__)


class StepPrograms:
    """Programs of one model, captured when they are first asked for.

    Args:
        runtime: of the model's experts.

    Attributes:
        reason: why the model has none of any size; None where it has, or may have.
        reasons: why it has none of so many rows, by that number.
    """

    def __init__(self, runtime: ExpertRuntime) -> None:
        self.reason: str | None = None
        self.reasons: dict[int, str] = {}
        self._runtime = runtime
        self._runners: dict[int, StepRunner] = {}
        self._state: ModelState | None = None

    def __iter__(self) -> Iterator[StepRunner]:
        return iter(self._runners.values())

    def runner(self, model: PreTrainedModel, num_rows: int) -> StepRunner | None:
        """Return the program of so many rows; None where the model has none, or is not what it was captured from."""
        if self.reason is None and num_rows not in self._runners.keys() | self.reasons.keys():
            self._capture(model, num_rows)
        if self.reason is not None or self._state is None or not self._state.is_unchanged():
            return None
        return self._runners.get(num_rows)

    def _capture(self, model: PreTrainedModel, num_rows: int) -> None:
        if instruction_set() is None:
            self.reason = "the compiled kernels were not built"
            return
        try:
            bound = BoundProgram(lower(capture(model, num_rows), num_rows), model)
        except UnsupportedModelError as error:
            self.reasons[num_rows] = str(error)
            return
        except Exception as error:  # an operation that no rule was written for: the model's own code goes on
            reason = f"its step cannot be written as a program ({type(error).__name__}: {str(error)[:200]})"
            _log.warning("%s decodes by its own code: %s", type(model).__name__, reason)
            self.reasons[num_rows] = reason
            return
        experts: list[OffloadedExperts] = [module._moeflow for _, module in experts_interface.experts_modules(model)]
        runner = StepRunner(bound, self._runtime, experts)
        if num_rows > 1 and runner.is_of_one:
            self.reasons[num_rows] = "its step of several sequences has states that are no keys and values"
            return
        try:
            with self._runtime.unwatched():
                differs = difference(model, runner)
        except (UnsupportedModelError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            differs = f"its step as a program fails ({type(error).__name__}: {str(error)[:200]})"
        if differs is None:
            self._runners[num_rows] = runner
            self._state = self._state or ModelState(model)
        else:
            self.reasons[num_rows] = differs
