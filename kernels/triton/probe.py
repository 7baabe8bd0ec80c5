"""Whether Triton can compile and run a kernel here: it needs a C compiler, Python's headers and a folder to write to.

Triton builds its launcher in C when the first kernel runs, so that is tried once, with a tiny kernel, before a model
relies on it. Knows nothing of experts.
"""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch


@cache
def why_not(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on a device, and what to do; None where they can. Tries it once a process.

    Args:
        device: a GPU; under Triton's interpreter any.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed. Install it: pip install 'triton>=3.6'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU. Install a build of PyTorch for this GPU and its driver"
    return try_kernel(device)


def try_kernel(device: torch.device) -> str | None:
    """Compile and run a tiny kernel; say what hinders it, None where it ran."""
    try:
        import triton
        from moeflow.kernels.triton.probe_kernel import add_one

        number = torch.zeros(1, dtype=torch.int32, device=device)
        with torch.cuda.device_of(number):
            add_one[(1,)](number)
        found = int(number.item())
    except Exception as error:  # whatever Triton, its compilers or the driver say
        said = (str(error).strip() or repr(error)).splitlines()[0]
        return (
            _missing() or f"a first kernel failed: {type(error).__name__}: {said}. Update Triton and the GPU's driver"
        )
    if found != 1:
        return f"a first kernel of Triton {triton.__version__} gave {found} instead of 1. Update Triton and PyTorch"
    return None


def _missing() -> str | None:
    """Say which of Triton's needs is not met, as Triton itself looks for them."""
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None and (os.environ.get("CC") or shutil.which("clang") is None):
        return f"there is no C compiler ({compiler}). Install gcc, or name one in CC"
    headers = sysconfig.get_paths(scheme=_scheme())["include"]
    if not (Path(headers) / "Python.h").is_file():
        return f"Python.h is not in {headers}. Install Python's headers (python3-dev)"
    from triton import knobs

    folder = Path(knobs.cache.dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"Triton's cache folder {folder} cannot be written. Name another in TRITON_CACHE_DIR"
    return None


def _scheme() -> str:
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own
