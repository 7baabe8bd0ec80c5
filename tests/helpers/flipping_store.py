"""Experts on disk that arrive in their slots with one bit changed, as bad memory does it; all other reads are right."""

import threading
from typing import ClassVar

from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey


class FlippingStore(ExpertStore):
    """The store of a runtime.

    Attributes:
        flips: {expert: (byte, bit)} of its record.
    """

    flips: ClassVar[dict[ExpertKey, tuple[int, int]]] = {}

    def read(self, key, record, **how):
        num_bytes = super().read(key, record, **how)
        if key in self.flips and threading.current_thread().name == "moeflow-read":
            byte, bit = self.flips[key]
            record[byte] ^= 1 << bit
        return num_bytes


def flipping(**flips):
    """Return a class of stores that flips bits: flipping(flips={ExpertKey(0, 1): (7, 6)})."""
    return type("Flipping", (FlippingStore,), flips)
