"""What tells one machine from another, and one disk from another, as text. torch is not imported.

Knows the processor, the limits of this process and mount points. Knows nothing of speeds.
"""

import ctypes
import os
from pathlib import Path

import psutil

from moeflow import __version__
from moeflow.c_library import built_library
from moeflow.formatting import format_bytes
from moeflow.hardware import memory_limit_bytes
from moeflow.kernels import cpu
from moeflow.machine.gpus import gpu_names

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_KERNELS_VARIABLE = "MOEFLOW_CPU_KERNELS"


def hardware() -> str:
    """Describe what speeds depend on: processor, cores, memory, kernels, GPUs, limits of threads, version."""
    quota = cpu_quota()
    parts = [
        cpu_name(),
        f"{usable_cores()} cores" + (f" ({quota:g} by cgroup)" if quota else ""),
        f"{format_bytes(memory_limit_bytes())} memory",
        f"{kernels_in_use() or 'no'} kernels",
        *gpu_names(),
        *(f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)),
        f"moeflow {__version__}",
    ]
    return ", ".join(parts)


def cpu_name() -> str:
    """Return the processor's name, as Linux has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def usable_cores() -> int:
    """Return how many logical processors this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS or Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return how many processors' time the cgroup leaves to this process; None where it does not limit it."""
    try:
        path = next(
            line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0")
        )
    except (OSError, StopIteration):
        return None
    folder, quotas = Path("/sys/fs/cgroup") / path.lstrip("/"), []
    for each in (folder, *folder.parents):
        try:
            most, period = (each / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if most != "max":
            quotas.append(int(most) / int(period))
    return min(quotas, default=None)


def kernels_in_use() -> str | None:
    """Return the instruction set that the compiled kernels take; None where they are not built, or are off."""
    wanted = os.environ.get(_KERNELS_VARIABLE, "")
    if wanted == "off":
        return None
    try:
        use = ctypes.PyDLL(built_library("_cpu", cpu.__file__)).moeflow_cpu_use
    except (OSError, AttributeError):
        return None
    use.restype = ctypes.c_char_p
    return use(wanted.encode()).decode()


def disk_of(folder: Path) -> str:
    """Describe the file system that a folder lies in, or would lie in: mount point, type and device."""
    place = Path(os.path.realpath(folder))
    best = None
    for mount in psutil.disk_partitions(all=True):
        if place.is_relative_to(mount.mountpoint) and (
            best is None or len(mount.mountpoint) >= len(best.mountpoint)  # the last one hides those before it
        ):
            best = mount
    return f"{best.mountpoint} ({best.fstype}, {best.device})" if best else str(place.anchor)
