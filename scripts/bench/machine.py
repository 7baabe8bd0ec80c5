"""The machine and the software of a benchmark, and its card.

Knows nothing of models or engines, and imports no torch.
"""

import contextlib
import importlib.metadata
import os
import sys

import psutil

from moeflow.machine.identity import cpu_name, usable_cores


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
        "cpu": cpu_name(),
        "cores": usable_cores(),
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
