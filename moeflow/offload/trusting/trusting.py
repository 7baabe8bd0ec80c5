"""The trusted steps of one model: when they pay, and the one under way."""

import time
from collections.abc import Callable
from typing import Any

from moeflow.offload.residency import Residency
from moeflow.offload.resident_table import ResidentTable
from moeflow.offload.stats import Stats
from moeflow.offload.trusting.device_table import DeviceTable
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
    """

    def __init__(self, table: DeviceTable, stats: Stats) -> None:
        self.table = table
        self._stats = stats
        self.trust = Trust()
        self.step: TrustedStep | None = None

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
        self.step = TrustedStep(self.table)
        try:
            made = run()
            routes = self.step.finish()
        except NotTrustedError:
            self.trust.is_possible = False
            made, routes = None, NOTHING_KNOWN
        finally:
            self.step = None
        residency.end_use_of_all()
        self.trust.trusted(routes.missed, time.perf_counter() - begin)
        if not routes.missed:
            counts.count(routes.layers, routes.experts, 0.0)
        return made, routes.missed

    def as_dict(self) -> dict[str, Any]:
        """Return the mode ("trusting" once a step was right to), why none is where none can be, and the steps."""
        right, wrong = (self.trust.steps[is_right] for is_right in (True, False))
        reason = (
            None if self.trust.is_possible else "the experts of a layer are of several kinds, or no kernel finds them"
        )
        return {"mode": "trusting" if right else "python", "reason": reason, "steps": right, "repeated": wrong}

    def run_asking(self, run: Callable[[], Any]) -> Any:
        """Run a decode step whose layers ask for their experts, and see whether it would have been right to trust."""
        begin, misses = time.perf_counter(), self._stats.now.misses
        made = run()
        self.trust.asked(self._stats.now.misses > misses, time.perf_counter() - begin)
        return made
