"""How much of the processors other processes take while something is measured.

Knows /proc/stat. Knows nothing of what is measured.
"""

import os
import time
from pathlib import Path


class OthersLoad:
    """How much of the processors other processes take, from its making on. Linux; elsewhere nothing is known."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def share(self) -> float | None:
        """Return the part of all cores' time that others took, time that the machine's host took included."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        return max(busy - own, 0) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Return wall seconds, busy seconds of all cores, and those of this process and its children."""
        try:
            ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return None
        busy = sum(ticks) - ticks[3] - ticks[4]  # without idling and waiting for disks
        own = time.process_time() + sum(os.times()[2:4])  # and of children that have ended
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), own
