"""One layer's demand for experts, by where each was found."""

from typing import NamedTuple

from moeflow.core import ExpertKey


class Demand(NamedTuple):
    """The experts that one layer demands in one pass, and the state of the link at that moment.

    Args:
        layer: number among the MoE layers.
        resident: demanded experts that are on the device.
        in_flight: demanded experts whose copy is under way already.
        absent: demanded experts that are neither.
        copy_s: seconds one copy takes.
        others_in_flight: prefetches under way that the layer does not demand.
    """

    layer: int
    resident: list[ExpertKey]
    in_flight: list[ExpertKey]
    absent: list[ExpertKey]
    copy_s: float
    others_in_flight: list[ExpertKey]
