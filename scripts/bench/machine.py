"""The machine and the software of a benchmark, and its card.

Knows nothing of models or engines, and imports no torch.
"""

import contextlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path

import psutil


def describe(*packages: str) -> dict:
    """Return processor, usable cores, load, memory, and the versions of Python and of the packages that are installed.

    Args:
        packages: names of distributions.
    """
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def print_card(lines: dict[str, str]) -> None:
    """Print a card: one line a fact, its name first."""
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        print(f"{name:{width}}{text}")
    print(flush=True)


def software(card: dict) -> str:
    """Return the versions of a card as a line."""
    return ", ".join(f"{name} {version}" for name, version in {"Python": card["python"], **card["versions"]}.items())


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


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
        """Return wall seconds, busy seconds of all cores, and those of this process."""
        try:
            ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return None
        busy = sum(ticks) - ticks[3] - ticks[4]  # without idling and waiting for disks
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()
