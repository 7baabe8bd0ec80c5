"""The trusted steps of one model: when they pay, and the one under way."""

import time
from collections.abc import Callable
from typing import Any

from moeflow.offload.residency import Residency
from moeflow.offload.resident_table import ResidentTable
from moeflow.offload.stats import Stats
from moeflow.offload.trusting.capture import Capture
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.step_graphs import StepGraphs
from moeflow.offload.trusting.step_pieces import StepPieces
from moeflow.offload.trusting.trusted_step import NOTHING_KNOWN, NotTrustedError, TrustedStep
from moeflow.policy.trust import Trust


class Trusting:
    """Runs trusted steps.

    Args:
        table: of the experts' slots.
        stats: the counters.

    Attributes:
        step: under way; None in steps that ask for their experts.
        trust: when a step is trusted.
        graphs: captured trusted steps; None where none is to be captured.
        pieces: captured asking steps; None where none is to be captured.
    """

    def __init__(self, table: DeviceTable, stats: Stats) -> None:
        self.table = table
        self._stats = stats
        self.trust = Trust()
        self.step: TrustedStep | None = None
        self.graphs: StepGraphs | None = None
        self.pieces: StepPieces | None = None
        self._began = 0.0

    def begin(self, captured: TrustedStep | None = None) -> TrustedStep:
        """Begin a step, or begin it anew where what ran before was none; by a captured one where it is replayed."""
        self._began = time.perf_counter()
        self.step = captured or TrustedStep(self.table)
        return self.step

    def begin_asking(self) -> None:
        """Begin a step that asks, or begin it anew where what ran before was none."""
        self._began = time.perf_counter()

    def capture(self, capture: Capture) -> None:
        """Let steps be captured: whole where they are trusted, in pieces where they ask."""
        self.graphs, self.pieces = StepGraphs(capture, self.table), StepPieces(capture)

    def close(self) -> None:
        """Give captured steps back."""
        for captured in filter(None, (self.graphs, self.pieces)):
            captured.close()

    def run(self, run: Callable[[], Any], residency: Residency, counts: ResidentTable) -> tuple[Any, bool]:
        """Run a step, and count what it asked for if it missed nothing.

        Args:
            run: runs the step.
            residency: of the experts; nothing else moves them meanwhile.
            counts: takes in what was used.

        Returns:
            What `run` returned, and whether an expert was missed, so that it is wrong.
        """
        begin = time.perf_counter()
        residency.settle_ended()
        residency.begin_use_of_all()
        self.table.refresh()
        prepared_s = time.perf_counter() - begin
        self.begin()
        try:
            made = run()
            assert self.step is not None
            routes = self.step.finish()
        except NotTrustedError:
            self.trust.is_possible = False
            made, routes = None, NOTHING_KNOWN
        finally:
            self.step = None
        residency.end_use_of_all()
        self.trust.trusted(routes.missed, prepared_s + time.perf_counter() - self._began)
        if not routes.missed:
            counts.count(routes.layers, routes.experts, 0.0)
        return made, routes.missed

    def as_dict(self) -> dict[str, Any]:
        """Return the mode ("trusting" once a step was right to), why none is where none can be, and the steps.

        Where steps are to be captured, also how many were, how many were replayed, and why the last was not.
        The same of steps in pieces, of which the last is the last that asked.
        """
        right, wrong = (self.trust.steps[is_right] for is_right in (True, False))
        reason = (
            None if self.trust.is_possible else "the experts of a layer are of several kinds, or no kernel finds them"
        )
        found: dict[str, Any] = {"mode": "trusting" if right else "python", "reason": reason}
        found |= {"steps": right, "repeated": wrong}
        if self.graphs is not None:
            found |= self.graphs.as_dict()
        if self.pieces is not None:
            found["pieces"] = self.pieces.as_dict()
        return found

    def run_asking(self, run: Callable[[], Any]) -> Any:
        """Run a decode step whose layers ask for their experts, and see whether it would have been right to trust."""
        misses = self._stats.now.misses
        self.begin_asking()
        made = run()
        self.trust.asked(self._stats.now.misses > misses, time.perf_counter() - self._began)
        return made
