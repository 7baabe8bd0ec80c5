"""Experts on disk whose reads begin with garbage, let other threads run, and fail at times."""

import numpy as np

from helpers.queued_device import GARBAGE, pages
from moeflow.checkpoint.store import ExpertStore


class DisturbedStore(ExpertStore):
    """The store of a run.

    Args:
        args: as of `ExpertStore`.
        run: a `DeviceRun`, which draws what happens.
    """

    def __init__(self, *args, run):
        super().__init__(*args)
        self._run = run

    def read(self, key, record, **how):
        self._disturb("a read from disk", record)
        self._run.fail_at_times()
        return super().read(key, record, **how)

    def _read_some(self, part, done):
        """Of a part, which a helper may read."""
        self._disturb("a part of a read", np.frombuffer(part.memory, np.uint8)[done:])
        self._run.fail_at_times()
        return super()._read_some(part, done)

    def _disturb(self, name, memory):
        self._run.device.host_access(name, writes=pages(memory.ctypes.data, memory.nbytes))
        memory[:] = GARBAGE
        self._run.threads.step()
