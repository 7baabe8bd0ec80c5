"""Checks of memory: what is free, the cgroup's limit, huge pages, swap, limits of locked memory and open files.

Knows Linux's files about memory. Knows nothing of models.
"""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

from moeflow.doctor.finding import HARMFUL, Finding
from moeflow.formatting import format_bytes
from moeflow.hardware import available_memory_bytes, memory_limit_bytes

_LITTLE_BYTES = 1 << 30
_MANY_FILES = 1024
_SYSTEM = Path("/")


def check_memory(*, has_gpu: bool) -> Iterator[Finding]:
    """Look at memory.

    Args:
        has_gpu: whether pinned memory will be asked for.
    """
    limit, whole, free = memory_limit_bytes(), psutil.virtual_memory().total, available_memory_bytes()
    found = f"{format_bytes(free)} free of {format_bytes(whole)}"
    if limit < whole:
        found += f"; the cgroup allows {format_bytes(limit)}"
    if free < _LITTLE_BYTES:
        yield Finding("memory", found, HARMFUL, "hardly a model fits", "end other programs, or raise the limit")
    else:
        yield Finding("memory", found)
    yield from check_huge_pages(_SYSTEM)
    swap = psutil.swap_memory()
    if swap.total and swap.used > max(swap.total // 4, _LITTLE_BYTES):
        yield Finding("swap", f"{format_bytes(swap.used)} of {format_bytes(swap.total)} in use", HARMFUL,
                      "memory is paged out; an expert that is paged out takes longer than one on disk",
                      "end programs that take memory, or lower expert_memory")  # fmt: skip
    else:
        yield Finding(
            "swap", f"{format_bytes(swap.used)} of {format_bytes(swap.total)} in use" if swap.total else "none"
        )
    yield from _limits(has_gpu)


def check_huge_pages(system: Path) -> Iterator[Finding]:
    """Look at transparent huge pages, below a root folder; nothing is told where the system has no such file."""
    try:
        text = (system / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return
    mode = text.partition("[")[2].partition("]")[0]
    if mode == "never":
        yield Finding("huge pages", "never", HARMFUL, "experts are read up to a fifth slower from memory and from disk",
                      "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root")  # fmt: skip
    else:
        yield Finding("huge pages", mode or text.strip())


def _limits(has_gpu: bool) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # Windows
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _MANY_FILES:
        yield Finding("open files", f"{files} (ulimit -n)", HARMFUL,
                      "a model of many shards, or a server with many clients, runs out of them",
                      f"ulimit -n {_MANY_FILES}, or more")  # fmt: skip
    if not has_gpu:
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    wsl = "microsoft" in platform.release().lower()
    found = "no limit" if locked == resource.RLIM_INFINITY else f"{format_bytes(locked)} (ulimit -l)"
    if wsl:
        yield Finding("pinned memory", f"{found}; WSL", HARMFUL, "WSL pins no more than half of its memory",
                      "give WSL more in .wslconfig, or set host_memory to less than half")  # fmt: skip
    else:
        yield Finding("pinned memory", found)
    with contextlib.suppress(OSError):
        if "swiotlb=force" in Path("/proc/cmdline").read_text():
            yield Finding("copies to the GPU", "swiotlb=force", HARMFUL, "each copy goes through a bounce buffer",
                          "start the system without it")  # fmt: skip
