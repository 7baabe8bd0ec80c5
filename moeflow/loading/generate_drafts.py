"""Drafts of `generate`: prompt lookup on one model, and the gate that says how many tokens of it pay.

Knows steps of one sequence. Knows nothing of engines, which have gates of their own.
"""

import logging
import threading
import time
from typing import Any

import torch

from moeflow.errors import MoeflowError
from moeflow.hf.passes.generating.candidates import Lookup
from moeflow.hf.passes.step_rows import EXACT_ROWS
from moeflow.offload.runtime import ExpertRuntime
from moeflow.policy.lookup.looked_up_text import LookedUpText
from moeflow.policy.speculation import Acceptance, SpeculationGate
from moeflow.policy.step_meter import StepMeter
from moeflow.policy.step_times import Step, StepTimes

_log = logging.getLogger(__name__)

_SOURCE = "prompt_lookup"
_FIRST_PASSES = 2  # of a call: the prompt, and the step that shows whether steps are native


class GenerateDrafts:
    """The drafts of all calls of `generate` on one model.

    Args:
        runtime: of the model, whose decode steps may be native.
        top_k: experts of a layer that a token takes.

    Attributes:
        lock: held while the gate is asked or told; calls may run in several threads.
        gate: of all calls.
        acceptance: of what they looked up.
        reason: why there are no drafts, whatever the gate says; None where there may be.
    """

    def __init__(self, runtime: ExpertRuntime, top_k: int) -> None:
        self.lock = threading.Lock()
        self.gate = SpeculationGate(StepTimes(max(runtime.experts_per_layer), top_k), EXACT_ROWS)
        self.acceptance = Acceptance()
        self.reason: str | None = None
        self.steps = {"speculated": 0, "plain": 0}
        self.counts: dict[str, Any] = {"proposed": 0, "accepted": 0, "seconds": 0.0, "reason": None}
        self.runtime = runtime
        self._seen_rows: set[int] = set()  # powers of two, of which a step was run
        self._ready_rows: set[int] = set()  # rows of steps that run natively

    def begin(self, lookup: Lookup) -> "CallDrafts | None":
        """Return the drafts of a call; None where its steps do not run natively."""
        if self.reason is None and self.runtime.step.programs.reason is None:
            return CallDrafts(self, lookup)
        return None

    def runs(self, num_rows: int) -> bool:
        """Whether a step of so many tokens runs natively; makes its program, once a model. Waits for other passes."""
        if num_rows in self._ready_rows:
            return True
        try:
            if not self.runtime.step.takes_span(num_rows):
                self.reason = "several tokens of a sequence do not run natively"
                return False
        except (MoeflowError, OSError, MemoryError) as error:
            _log.info("the program of %d rows is made at a later step: %s", num_rows, error)
            return False
        self._ready_rows.add(num_rows)
        return True

    def finish(self, num_drafted: int, num_accepted: int, step: Step) -> None:
        """Take in a native step of one sequence."""
        self.steps["speculated" if num_drafted else "plain"] += 1
        self.counts["proposed"] += num_drafted
        self.counts["accepted"] += num_accepted
        size = 1 << num_drafted.bit_length()
        if size in self._seen_rows:  # before, its program may have been made
            self.gate.finish(1, num_drafted, 1 + num_accepted, step)
        self._seen_rows.add(size)

    def stats(self) -> dict[str, Any]:
        """Return what an engine's `stats()["speculation"]` says, of all calls."""
        gate = self.gate
        with self.lock:
            return {
                "on": self.reason is None and gate.is_on,
                "reason": self.reason or gate.reason,
                **{f"{name}_steps": count for name, count in self.steps.items()},
                **gate.gains._asdict(),
                "growth": gate.times.growths(),
                "union": gate.times.unions(),
                "waits": None,
                "sources": {_SOURCE: dict(self.counts)},
            }


class CallDrafts:
    """The drafts of one call.

    Args:
        drafts: of the model.
        lookup: what the call asks for.
    """

    def __init__(self, drafts: GenerateDrafts, lookup: Lookup) -> None:
        self._of, self._lookup = drafts, lookup
        self._text = LookedUpText()
        self._meter = StepMeter(drafts.runtime)
        self._num_passes = 0
        self._was_native = False
        self._native_steps = 0  # before the pass under way
        self._begin_s = 0.0
        self._tokens: list[int] | None = []  # that the pass under way verifies
        self._promised = 0.0  # of each of them

    def propose(self, ids: torch.Tensor) -> list[int] | None:
        """Return the tokens that the next pass verifies; None where the last one was not native."""
        self._begin_s = time.perf_counter()
        self._meter.begin()
        self._native_steps = self._of.runtime.step.steps_here
        self._num_passes += 1
        tokens = self._chosen(ids)
        self._tokens = [] if tokens and not self._of.runs(1 + len(tokens)) else tokens
        return self._tokens

    def judge(self, num_accepted: int) -> None:
        """Take in how many of them were accepted, as soon as their pass has ended."""
        step = self._meter.finish(time.perf_counter() - self._begin_s)
        self._was_native = self._of.runtime.step.steps_here > self._native_steps
        if self._tokens is None or self._num_passes == 1:
            return
        with self._of.lock:
            if self._was_native:
                for place in range(min(num_accepted + 1, len(self._tokens))):
                    accepted = place < num_accepted
                    self._of.acceptance.judge(_SOURCE, place, self._promised, accepted=accepted)
                self._of.finish(len(self._tokens), num_accepted, step)
            elif self._tokens:
                self._of.reason = "a step with a draft did not run natively"

    def _chosen(self, ids: torch.Tensor) -> list[int] | None:
        of, most = self._of, min(self._lookup.most, EXACT_ROWS - 1, self._lookup.max_length - len(ids) - 1)
        if self._num_passes <= _FIRST_PASSES:
            return []
        if not self._was_native:
            of.gate.reason = "steps do not run natively"
            return None
        if most < 1:
            return []
        with of.lock:
            if not of.gate.wants_drafts(1):
                return []
            begin = time.perf_counter()
            self._text.read(ids[self._text.num_read :].tolist())
            tokens, self._promised = self._text.behind(most)
            of.counts["seconds"] += time.perf_counter() - begin
            end = next((place for place, token in enumerate(tokens) if token in self._lookup.ends), len(tokens))
            chances = [of.acceptance.probability(_SOURCE, place, self._promised) for place in range(end)]
            (count,) = of.gate.choose(1, [chances])
            return tokens[:count]
