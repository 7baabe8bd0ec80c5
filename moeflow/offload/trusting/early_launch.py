"""A layer on a GPU that is launched before the host knows its routes; they come down while the device computes.

Right where the table showed every expert that the layer wants. Where it did not, the layer is run again, asking. Knows
the table and residency. Knows nothing of routers or arithmetic.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from moeflow.offload.residency import Residency
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.downloads import Downloads


class EarlyLaunch(NamedTuple):
    """What came of it.

    Args:
        values: uint8 [n], the bytes that came down.
        experts: distinct ones that the layer wants, in the order of `ExpertRuntime.fetch`.
        output: of the layer; None where it was not launched, or an expert was missed.
    """

    values: np.ndarray
    experts: list[int]
    output: torch.Tensor | None


def launch_early(
    layer: int,
    launch: Callable[[], torch.Tensor],
    packed: torch.Tensor,
    shape: Sequence[int],
    *,
    table: DeviceTable,
    residency: Residency,
    downloads: Downloads,
) -> EarlyLaunch:
    """Launch a layer by the table, bring its routes down, and wait for them alone.

    A layer is not launched where that would make it wait for a copy which it may not want, or where it surely misses.
    Nothing else moves experts meanwhile, and an error in here leaves none resident (`ExpertRuntime.changing`).

    Args:
        layer: number among the MoE layers.
        launch: runs the layer by the table.
        packed: int32 [n], what comes down: T * K expert numbers, and then anything else.
        shape: T, K.
        table: of the experts' slots.
        residency: of the experts.
        downloads: the ways down.
    """
    residency.settle_ended()
    residency.follow_latest_use()  # which may read the table that is written now
    table.refresh()
    shown = table.shown(layer)
    slots = shown[shown >= 0].tolist()
    output, download = None, downloads.start(packed)  # before the layer's kernels: it does not wait for them
    if len(slots) >= shape[1] and residency.have_copied(slots):
        output = launch()
    values = download.wait()
    chosen = values.view(np.int32)[: shape[0] * shape[1]]
    chosen = chosen[(chosen >= 0) & (chosen < len(shown))]
    experts = list(dict.fromkeys(chosen.tolist())) if shape[0] == 1 else np.unique(chosen).tolist()
    found = shown[experts]
    residency.end_look_up([] if output is None else found[found >= 0].tolist())
    return EarlyLaunch(values.copy(), experts, None if (found < 0).any() else output)
