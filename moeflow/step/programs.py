"""The step programs of one model, one for each number of rows, ready to run."""

import gc
import logging
from collections.abc import Iterator

from transformers import PreTrainedModel

from moeflow.errors import MoeflowError, UnsupportedModelError
from moeflow.hf import experts_interface
from moeflow.hf.passes.capture import capture
from moeflow.kernels.cpu.library import instruction_set
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.bound import BoundProgram
from moeflow.step.check import difference, spans_agree
from moeflow.step.fuse import fuse
from moeflow.step.lower import lower
from moeflow.step.program import Program
from moeflow.step.program_file import KeptProgram
from moeflow.step.program_folder import KeptFile
from moeflow.step.runner import StepRunner
from moeflow.step.unchanged import ModelState

_log = logging.getLogger(__name__)


class StepPrograms:
    """Programs of one model, captured or taken from the disk when they are first asked for.

    Args:
        runtime: of the model's experts.
        loaded: the model as it was loaded; one that is changed has no programs until that is undone.

    Attributes:
        reason: why the model has none of any size; None where it has, or may have.
        reasons: why it has none of so many rows, by that number.
        was_kept: whether what is known came from the disk, by number of rows.
        changed: what the last step found changed in the model; None where nothing was.
    """

    def __init__(self, runtime: ExpertRuntime, loaded: ModelState) -> None:
        self.reason: str | None = None
        self.reasons: dict[int, str] = {}
        self.was_kept: dict[int, bool] = {}
        self.changed: str | None = None
        self._runtime = runtime
        self._loaded = loaded
        self._runners: dict[int, StepRunner] = {}
        self._takes_spans: bool | None = None
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
            self._prepare(model, num_rows)
        self._own_code_ran = False
        return self._runners.get(num_rows)

    def takes_spans(self, model: PreTrainedModel, runner: StepRunner) -> bool:
        """Whether several tokens of one sequence may be rows of a step: compared once with the model's own code."""
        if self._takes_spans is None:
            try:
                with self._runtime.unwatched():
                    self._takes_spans = spans_agree(model, runner)
            except (MoeflowError, MemoryError):  # of the experts, or of the moment: the next call tries again
                raise
            except Exception as error:  # the model's own code takes no such call, or its own error tells why
                _log.info("%s runs several tokens by its own code: %s", type(model).__name__, error)
                self._takes_spans = False
        return self._takes_spans

    def look_closer(self) -> None:
        """Note that the model's own code ran: the caller may have changed what does not change between two steps."""
        self._own_code_ran = True

    def _prepare(self, model: PreTrainedModel, num_rows: int) -> None:
        """Take a program from the disk, or capture it and keep it there."""
        if instruction_set() is None:
            self.reason = "the compiled kernels were not built"
            return
        file = KeptFile(model, num_rows)
        kept = file.read()
        runner = None
        if kept is not None and kept.program is not None:
            try:
                runner = self._bind(model, kept.program)
            except Exception:  # a setup that fails on these weights: the file is not what a capture wrote
                kept = None
        self.was_kept[num_rows] = kept is not None
        if kept is None:
            kept, runner = self._capture(model, num_rows)
            gc.collect()  # graphs of torch's refer to themselves, and to the model
            file.write(kept)
        if kept.reason is not None:
            self.reasons[num_rows] = kept.reason
        if runner is not None:
            self._runners[num_rows] = runner

    def _capture(self, model: PreTrainedModel, num_rows: int) -> tuple[KeptProgram, StepRunner | None]:
        """Capture a program and compare it with the model's own code.

        Raises:
            MoeflowError, MemoryError: of the experts, or of the moment. The next call tries again.
        """
        _log.info("the decode step of %s is written as a program, once a model", type(model).__name__)
        what, reason = "cannot be written as a program", None
        try:
            program = lower(capture(model, num_rows), num_rows)
            runner = self._bind(model, program)
            what = "as a program fails"
            if num_rows > 1 and runner.is_of_one:
                reason = "its step of several sequences has states that are no keys and values"
            else:
                with self._runtime.unwatched():
                    reason = difference(model, runner)
        except UnsupportedModelError as error:
            reason = str(error)
        except (MoeflowError, MemoryError):
            raise
        except Exception as error:  # an operation that no rule was written for, or the model's own code: that goes on
            reason = f"its step {what} ({type(error).__name__}: {str(error)[:200]})"
            _log.warning("%s decodes by its own code: %s", type(model).__name__, reason)
        return (KeptProgram(program, None), runner) if reason is None else (KeptProgram(None, reason), None)

    def _bind(self, model: PreTrainedModel, program: Program) -> StepRunner:
        experts: list[OffloadedExperts] = [module._moeflow for _, module in experts_interface.experts_modules(model)]
        return StepRunner(BoundProgram(fuse(program), model), self._runtime, experts)
