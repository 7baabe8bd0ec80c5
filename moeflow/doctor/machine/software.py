"""Checks of versions, of the compiled kernels and of threads.

Knows installed distributions and the processor. Knows nothing of models.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement

from moeflow import __version__
from moeflow.c_library import built_library
from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.kernels import cpu
from moeflow.machine.identity import cpu_name, cpu_quota, kernels_in_use, usable_cores

_SHOWN = ("torch", "transformers", "safetensors", "huggingface-hub", "tokenizers", "numpy")
_COMPILERS = ("c++", "g++", "clang++")
_KERNELS = "MOEFLOW_CPU_KERNELS"
_IN_TORCH = "experts run in torch, several times slower"
_BUILD = "install moeflow again where there is a C++ compiler (pip install --force-reinstall --no-deps moeflow)"


def check_software() -> Iterator[Finding]:
    """Look at versions, kernels and threads."""
    yield Finding("moeflow", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from check_libraries(_requirements())
    yield from _kernels()
    yield from _threads()


def check_libraries(requirements: list[str]) -> Iterator[Finding]:
    """Compare installed libraries with what moeflow requires; tell those that are well in one line.

    Args:
        requirements: as in a distribution's metadata.
    """
    shown = []
    for line in requirements:
        with contextlib.suppress(InvalidRequirement):
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            remedy = f'pip install "{line.partition(";")[0].strip()}"'
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                why = f"moeflow needs {wanted.name} {wanted.specifier}"
                yield Finding(wanted.name, "not installed", BROKEN, why, remedy)
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                why = f"moeflow was tested with {wanted.specifier}, not with this version"
                yield Finding(wanted.name, version, BROKEN, why, remedy)
            elif wanted.name in _SHOWN:
                shown.append(f"{wanted.name} {version}")
    if shown:
        yield Finding("libraries", ", ".join(shown))


def _requirements() -> list[str]:
    """Return what moeflow requires; of a checkout that was not installed only the names."""
    try:
        found = importlib.metadata.requires("moeflow")
    except importlib.metadata.PackageNotFoundError:
        found = None
    return found or list(_SHOWN)


def _kernels() -> Iterator[Finding]:
    name, wanted, used = "kernels", os.environ.get(_KERNELS, ""), None
    processor = f"{cpu_name()}, {usable_cores()} cores"
    with contextlib.suppress(OSError):
        used = kernels_in_use()
    best = _best_instruction_set()
    if wanted == "off":
        yield Finding(name, f"{_KERNELS}=off; {processor}", HARMFUL, _IN_TORCH, f"unset {_KERNELS}")
    elif wanted and wanted not in ("avx512", "avx2", "portable"):
        yield Finding(name, f"{_KERNELS}={wanted}", BROKEN, "there are no kernels of that name, and no model loads",
                      f"unset {_KERNELS}, or set it to avx512, avx2, portable or off")  # fmt: skip
    elif used is None:
        why = "it was not built"
        try:
            built_library("_cpu", cpu.__file__)
        except OSError as error:
            why = str(error)
        yield Finding(name, f"none: {why}; {processor}", HARMFUL, _IN_TORCH, _BUILD)
    elif best and used == "portable":
        wrong, remedy = f"this processor has {best}, which is several times faster", _BUILD
        yield Finding(name, f"{used}; {processor}", HARMFUL, wrong, f"unset {_KERNELS}" if wanted else remedy)
    else:
        yield Finding(name, f"{used}; {processor}")
    chosen = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    compiler = next(filter(None, map(shutil.which, chosen)), None)
    if compiler or used:
        yield Finding("compiler", compiler or "none; none is needed, the kernels are built")
    else:
        yield Finding("compiler", "none", HARMFUL, "moeflow's kernels cannot be built", "install g++ or clang++")


def _best_instruction_set() -> str | None:
    """Return the best vector instructions that the processor has and that there are kernels for; None where unknown."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return None
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= flags else None


def _threads() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        why = str(error).partition("\n")[0]
        yield Finding(
            "torch", "it cannot be imported", BROKEN, why, "install it again: pip install --force-reinstall torch"
        )
        return
    threads, cores, quota = torch.get_num_threads(), usable_cores(), cpu_quota()
    found = f"{threads} of torch, on {cores} cores" + (f", {quota:g} of them by the cgroup" if quota else "")
    allowed = min(cores, quota or cores)
    if threads > max(1, allowed):
        yield Finding("threads", found, HARMFUL, "threads take turns on cores, and each layer waits for the last one",
                      f"set OMP_NUM_THREADS={max(1, int(allowed))}")  # fmt: skip
    elif 2 * threads <= min(cores, quota or cores) and os.environ.get("OMP_NUM_THREADS"):
        yield Finding("threads", found, HARMFUL, "half of the cores or more stay idle",
                      f"unset OMP_NUM_THREADS, or set it to {int(allowed)}")  # fmt: skip
    else:
        yield Finding("threads", found)
