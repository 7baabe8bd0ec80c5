"""A child process under a memory limit of its own: a fresh memory cgroup (v1 or v2) that is gone afterwards.

The limit holds for the whole process: code, heap, mapped files and the page cache it fills. Knows nothing of models.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

CGROUP_ROOT = Path("/sys/fs/cgroup")
_names = iter(range(1 << 30))


class CgroupUnavailable(OSError):
    """No memory cgroup can be made here."""


class MemoryCgroup:
    """One memory cgroup; use as a context manager, which removes it.

    Args:
        folder: the cgroup's folder, made by `create`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, limit_bytes: int) -> "MemoryCgroup":
        """Make a cgroup below this process's own one, or below the nearest ancestor that allows it.

        Raises:
            CgroupUnavailable: the machine has no memory controller for us, or does not let us use it.
        """
        refusals = []
        for parent, version in _parents():
            folder = parent / f"moeflow-bench-{os.getpid()}-{next(_names)}"
            try:
                folder.mkdir()
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror}")
                continue
            cgroup = cls(folder)
            try:
                _set_limit(folder, limit_bytes, version)
                # A cgroup that takes a limit may still take no process (v2 without delegation).
                subprocess.run(["true"], preexec_fn=cgroup.join, check=True)
                return cgroup
            except (OSError, subprocess.SubprocessError) as error:
                refusals.append(f"{parent}: {getattr(error, 'strerror', None) or error}")
                cgroup.remove()
        raise CgroupUnavailable(refusals[0] if refusals else "this system has no memory cgroups")

    def __enter__(self) -> "MemoryCgroup":
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()

    def join(self) -> None:
        """Move the calling process into the cgroup."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """Return the most memory the cgroup ever held, page cache included, where the kernel tells."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                return int((self.folder / name).read_text())
        return None

    def num_oom_kills(self) -> int:
        """Return how many processes the kernel killed to keep the limit."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                values = dict(line.split()[:2] for line in (self.folder / name).read_text().splitlines())
                return int(values.get("oom_kill", 0))
        return 0

    def remove(self) -> None:
        """Remove the cgroup; its last process may take a moment to be gone."""
        for _ in range(100):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.05)


def _parents():
    """Yield (cgroup folder, version) under which a memory cgroup may be made, nearest to this process first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in sorted(lines, key=lambda line: line.startswith("0::")):  # a v1 memory controller rules out v2's
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, version = CGROUP_ROOT / "memory", 1
        elif not controllers and (CGROUP_ROOT / "cgroup.controllers").exists():
            root, version = CGROUP_ROOT, 2
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            yield folder, version
            folder = folder.parent


def _set_limit(folder: Path, limit_bytes: int, version: int) -> None:
    """Set the limit, swap not being a way round it."""
    if version == 1:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        swap, swap_bytes = folder / "memory.memsw.limit_in_bytes", limit_bytes
    else:
        if not (folder / "memory.max").exists():
            (folder.parent / "cgroup.subtree_control").write_text("+memory")
        (folder / "memory.max").write_text(str(limit_bytes))
        swap, swap_bytes = folder / "memory.swap.max", 0
    with contextlib.suppress(OSError):
        swap.write_text(str(swap_bytes))


class Finished(NamedTuple):
    """How a process ended.

    Args:
        returncode: as in subprocess.
        stdout, stderr: its output.
        peak_bytes: its cgroup's highest usage, or None without a cgroup.
        oom_killed: whether the kernel killed it for its limit.
        timed_out: whether it was ended for taking too long.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None
    oom_killed: bool
    timed_out: bool


def run_process(command: list[str], *, limit_bytes: int | None, timeout_s: float) -> Finished:
    """Run a command to its end, in a fresh memory cgroup from its first instruction on.

    Whatever ends this call, Ctrl-C included, the process and its children are gone afterwards, and so is the cgroup.

    Args:
        command: program and arguments.
        limit_bytes: the cgroup's limit; None for no cgroup.
        timeout_s: seconds after which it is killed.

    Raises:
        CgroupUnavailable: a limit was given and no cgroup can be made.
    """
    with contextlib.ExitStack() as stack:
        cgroup = stack.enter_context(MemoryCgroup.create(limit_bytes)) if limit_bytes is not None else None
        out, err = stack.enter_context(tempfile.TemporaryFile()), stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=cgroup.join if cgroup else None,
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its session: the process, if alive, and its children
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        peak = cgroup.peak_bytes() if cgroup else None
        return Finished(process.returncode, *texts, peak, bool(cgroup and cgroup.num_oom_kills()), timed_out)


def drop_page_cache(files: list[Path]) -> int:
    """Ask the kernel to forget the cached pages of files; return the bytes that stayed (others map them)."""
    left = 0
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += _cached_bytes(file)
    return left


def _cached_bytes(file) -> int:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return 0
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, np.uint8)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages)
        del view
    return 0 if failed else int((np.frombuffer(pages, np.uint8) & 1).sum()) * mmap.PAGESIZE
