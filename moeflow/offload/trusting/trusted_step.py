"""A decode step on a GPU that trusts that no expert is missed: no layer asks the host for anything.

Layers look their experts up in the device's table and note where they miss one. At the end the host learns the routes
and the misses, in one copy.
"""

from typing import NamedTuple

import numpy as np
import torch

from moeflow.offload.trusting.device_table import DeviceTable


class StepRoutes(NamedTuple):
    """What a trusted step asked for.

    Args:
        layers: their numbers, in their order.
        experts: of each, [T, K] expert numbers.
        missed: whether an expert was absent, so that the step is wrong.
    """

    layers: list[int]
    experts: list[np.ndarray]
    missed: bool


NOTHING_KNOWN = StepRoutes([], [], missed=True)


class NotTrustedError(Exception):
    """A layer that cannot run without asking. It ends the step, and never leaves the runtime."""


class TrustedStep:
    """One such step.

    Args:
        table: of the experts' slots, refreshed.
    """

    def __init__(self, table: DeviceTable) -> None:
        self.table = table
        self._layers: list[int] = []
        self._routes: list[torch.Tensor] = []
        self._packed: torch.Tensor | None = None  # flags and routes, int64
        table.missed.zero_()

    def add(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Note a layer that was launched: [T, K] expert numbers."""
        self._layers.append(layer)
        self._routes.append(top_k_index)

    def pack(self) -> torch.Tensor:
        """Put what the host is to learn into one tensor on the device, once the last layer was launched."""
        flat = [self.table.missed.long(), *(routes.reshape(-1).long() for routes in self._routes)]
        self._packed = torch.cat(flat)
        return self._packed

    def finish(self) -> StepRoutes:
        """Wait for the step's end and return what it asked for."""
        values = (self.pack() if self._packed is None else self._packed).cpu().numpy()
        missed, begin, experts = values[: len(self.table.missed)].any(), len(self.table.missed), []
        for routes in self._routes:
            experts.append(values[begin : begin + routes.numel()].reshape(routes.shape))
            begin += routes.numel()
        return StepRoutes(self._layers, experts, missed=bool(missed))
