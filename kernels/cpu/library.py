"""Finds and loads the compiled library of CPU kernels, hands it torch's threads and sets its instruction set.

Knows the library's functions by name and argument types. Knows nothing of tensors' meaning.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import torch  # noqa: F401  it loads the OpenMP whose threads the kernels share

from moeflow.c_library import built_library
from moeflow.errors import ConfigError

_log = logging.getLogger(__name__)

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
VARIABLE = "MOEFLOW_CPU_KERNELS"


class Library(NamedTuple):
    """The loaded library: `held` functions keep the interpreter lock, as torch's own do; `free` ones let go of it."""

    name: str
    held: ctypes.CDLL
    free: ctypes.CDLL


def instruction_set() -> str | None:
    """Return the kernels' instruction set: "avx512", "avx2" or "portable"; None where they were not built or are off.

    Raises:
        ConfigError: the environment variable MOEFLOW_CPU_KERNELS names no path.
    """
    found = library()
    return found and found.name


@cache
def library() -> Library | None:
    """Load the library and choose the instruction set; None, said once, where it cannot be used or is off."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if wanted and wanted not in INSTRUCTION_SETS:
        raise ConfigError(
            f"{VARIABLE}={wanted} is no instruction set. Allowed: {', '.join(INSTRUCTION_SETS)} or off; without it the "
            "best that this processor has."
        )
    try:
        path = built_library("_cpu", __file__)
        held, free = ctypes.PyDLL(path), ctypes.CDLL(path)
        held.moeflow_cpu_use.restype = c_char_p
        name = held.moeflow_cpu_use(wanted.encode()).decode()
    except (OSError, AttributeError) as error:
        _log.warning(
            "moeflow's compiled kernels cannot be used (%s): experts run in torch, several times slower. Install "
            "moeflow again where there is a C++ compiler.", error,
        )  # fmt: skip
        return None
    if wanted and name != wanted:
        _log.warning("%s=%s: this processor has no %s, its kernels run on %s", VARIABLE, wanted, wanted, name)
    pointer, long = c_void_p, c_int64
    free.moeflow_cpu_experts.argtypes = [
        *[pointer] * 3, c_int, pointer, pointer, long, pointer, c_int, long, long, pointer, long, c_int, c_int,
    ]  # fmt: skip
    held.moeflow_cpu_token.argtypes = [
        pointer, pointer, c_int, pointer, long, pointer, c_int, pointer, c_int, c_int, c_int,
    ]  # fmt: skip
    for functions in (held, free):
        functions.moeflow_cpu_layer.argtypes = [
            pointer, pointer, long, pointer, pointer, c_int, pointer, c_int, long, long, long, pointer, pointer,
            pointer, c_int, c_int,
        ]  # fmt: skip
    held.moeflow_cpu_combine.argtypes = [pointer, pointer, c_int, long, long, long, pointer, c_int, c_int]
    held.moeflow_cpu_linear.argtypes = [pointer, pointer, pointer, c_int, long, long, pointer, c_int, c_int]
    held.moeflow_cpu_rms_norm.argtypes = [pointer, long, pointer, c_float, long, long, pointer, c_int, c_int]
    free.moeflow_step_run.argtypes = [pointer, long, long, pointer]
    free.moeflow_step_run.restype = long
    free.moeflow_lossless_encode.argtypes = [pointer, long, long, pointer, pointer, pointer, long]
    free.moeflow_lossless_encode.restype = long
    free.moeflow_lossless_decode.argtypes = [pointer, pointer, pointer, long, long, long, pointer]
    free.moeflow_lossless_rows.argtypes = [pointer, pointer, pointer, long, long, long, pointer, long, pointer]
    free.moeflow_cpu_block_rows.argtypes = [pointer, pointer, long, pointer, c_int]
    free.moeflow_cpu_read.argtypes = [pointer, long, c_int]
    free.moeflow_cpu_read.restype = c_uint64
    _share_threads(held)
    return Library(name, held, free)


loaded = cast("Callable[[], Library]", library)
"""`library`, for callers that hold an `ExpertKernel` or asked `instruction_set`: there it is never None."""


def _share_threads(library: ctypes.PyDLL) -> None:
    """Hand the library the threads of the OpenMP that torch has loaded; without it kernels run in one thread."""
    names = ("GOMP_parallel", "omp_get_thread_num")
    path = _loaded_openmp()
    try:
        openmp = ctypes.CDLL(path) if path else None
        addresses = [ctypes.cast(getattr(openmp, name), c_void_p) for name in names]
    except (OSError, AttributeError):
        _log.warning("torch's OpenMP (libgomp) was not found: moeflow's kernels run in one thread")
        return
    library.moeflow_cpu_openmp.argtypes = [c_void_p] * 2
    library.moeflow_cpu_openmp.restype = None
    library.moeflow_cpu_openmp(*addresses)


def _loaded_openmp() -> str | None:
    """Return the path of the libgomp in this process; None where there is none or another OpenMP."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    beside_torch = [path for path in sorted(paths) if Path(path).parent.parent.name.startswith("torch")]
    return next(iter(beside_torch or sorted(paths)), None)
