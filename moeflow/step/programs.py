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
        loaded: the model as it was loaded; one that is changed has no programs until that is undone.

    Attributes:
        reason: why the model has none of any size; None where it has, or may have.
        reasons: why it has none of so many rows, by that number.
        changed: what the last step found changed in the model; None where nothing was.
    """

    def __init__(self, runtime: ExpertRuntime, loaded: ModelState) -> None:
        self.reason: str | None = None
        self.reasons: dict[int, str] = {}
        self.changed: str | None = None
        self._runtime = runtime
        self._loaded = loaded
        self._runners: dict[int, StepRunner] = {}
        self._own_code_ran = True  # since the last step
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[StepRunner]:
        return iter(self._runners.values())

    def runner(self, model: PreTrainedModel, num_rows: int) -> StepRunner | None:
        """Return the program of so many rows; None where the model has none, or is not what was loaded."""
        if self.reason is not None:
            return None
        self.changed = self._loaded.change() or (self._loaded.change_behind_a_pass() if self._own_code_ran else None)
        if self.changed is not None:
            if self.changed not in self._told:
                self._told.add(self.changed)
                _log.warning("%s decodes by its own code: %s", type(model).__name__, self.changed)
            return None
        if self._own_code_ran:
            for runner in self:
                runner.bound.compute_constants()
        if num_rows not in self._runners.keys() | self.reasons.keys():
            self._capture(model, num_rows)
        self._own_code_ran = False
        return self._runners.get(num_rows)

    def look_closer(self) -> None:
        """Note that the model's own code ran: the caller may have changed what does not change between two steps."""
        self._own_code_ran = True

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
        else:
            self.reasons[num_rows] = differs
