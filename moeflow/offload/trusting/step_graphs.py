"""Trusted steps that are captured whole, so that a replay is one call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moeflow.offload.trusting.capture import Capture
from moeflow.offload.trusting.captured_steps import CapturedSteps, Recorded, StepMemory
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.trusted_step import TrustedStep


class StepGraphs(CapturedSteps):
    """The trusted steps of one model. `begin` takes the captured step that is replayed, and returns the one begun.

    Args:
        capture: of its device.
        table: of its experts' slots.
    """

    def __init__(self, capture: Capture, table: DeviceTable) -> None:
        super().__init__(capture)
        self._table = table

    def _fixed(self, cache: StepMemory) -> list[torch.Tensor]:
        return [self._table.arena, *cache.memory]

    def _record(self, capture: Capture, begin: Callable[..., TrustedStep], run: Callable[[], Any]) -> Recorded:
        steps: list[TrustedStep] = []

        def run_and_pack() -> Any:
            steps.append(begin())
            made = run()
            steps[-1].pack()
            return made

        made, replay = capture.capture(run_and_pack)
        return Recorded(made, partial(begin, steps[-1]), replay)
