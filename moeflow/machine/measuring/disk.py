"""Bytes a second that whole experts come from a disk, past the page cache where the file system allows it.

Knows files. Knows nothing of what is in them.
"""

import contextlib
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moeflow.atomic_file import cannot_write, write_all
from moeflow.core import PAGE_BYTES
from moeflow.errors import MoeflowError

EXPERT_BYTES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
IN_FLIGHT = 4  # experts that the runtime reads at a time
_LEAST_FILE = 1 << 26
_PIECE_BYTES = 1 << 24
_WRITING = 0.25  # of the time
_MODEL_FILES = ("*.moeflow", "*.safetensors", "*.gguf")


def disk_read(folder: Path, seconds: float, most_bytes: int = 1 << 29) -> tuple[dict[int, float], dict[int, float]]:
    """Measure reads of experts at random places, from a model's largest file there or from one written for it.

    Args:
        folder: on the disk; a file that is written has no name, and is gone when this returns or is killed.
        seconds: for all sizes, and for the writing.
        most_bytes: of the file that is written.

    Returns:
        Bytes of an expert -> bytes a second, with as many in flight as the runtime has; and with one.

    Raises:
        MoeflowError: the folder is not there, cannot be written, or its disk is full.
    """
    with _file_to_read(folder, seconds * _WRITING, most_bytes) as file:
        refuse_cache(file)
        sizes = [size for size in EXPERT_BYTES if size <= os.fstat(file).st_size]
        each = seconds * (1 - _WRITING) / (2 * len(sizes))
        try:
            return tuple({size: _rate(file, size, count, each) for size in sizes} for count in (IN_FLIGHT, 1))  # type: ignore[return-value]
        except OSError as error:
            raise MoeflowError(f"the disk of {folder} cannot be read: {error.strerror}. Check it.") from error


def refuse_cache(file: int) -> bool:
    """Have an open file read past the page cache; return whether its file system takes such reads."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    import fcntl  # not on Windows, which has no such flag

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | flag)
        os.preadv(file, [_buffer(PAGE_BYTES)], 0)
    except OSError:
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


@contextmanager
def _file_to_read(folder: Path, seconds: float, most_bytes: int) -> Iterator[int]:
    """Open a model's largest file, or write one: as much as comes to the disk in the time given."""
    models = [file for form in _MODEL_FILES for file in folder.glob(form) if file.is_file()]
    largest = max(models, key=lambda file: file.stat().st_size, default=None)
    try:
        if largest is not None and largest.stat().st_size >= _LEAST_FILE:
            with open(largest, "rb", buffering=0) as opened:
                yield opened.fileno()
            return
        if shutil.disk_usage(folder).free < 2 * _LEAST_FILE:
            raise MoeflowError(
                f"the disk of {folder} has less than {2 * _LEAST_FILE >> 20} MiB left, too few to measure its reads. "
                "Make room, or give a folder on another disk."
            )
        room = min(most_bytes, shutil.disk_usage(folder).free // 2)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as written:
            _write(written.fileno(), room, seconds)
            yield written.fileno()
    except OSError as error:
        raise MoeflowError(cannot_write(folder / "a file to measure", error)) from error


def _write(file: int, most_bytes: int, seconds: float) -> None:
    """Write random bytes to the disk for so long, but at least `_LEAST_FILE`."""
    bits, end, done = np.random.default_rng(0), time.perf_counter() + seconds, 0
    while done < _LEAST_FILE or (done < most_bytes and time.perf_counter() < end):
        write_all(file, bits.bytes(_PIECE_BYTES))
        os.fsync(file)
        done += _PIECE_BYTES
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _rate(file: int, num_bytes: int, in_flight: int, seconds: float) -> float:
    """Return bytes a second of reads at random pages, by so many threads at once."""
    places = (os.fstat(file).st_size - num_bytes) // PAGE_BYTES + 1
    ready = threading.Barrier(in_flight + 1)
    end = 0.0

    def read(number: int) -> int:
        order, memory, done = random.Random(number), _buffer(num_bytes), 0
        ready.wait()
        while done == 0 or time.perf_counter() < end:
            done += _read(file, memory, order.randrange(places) * PAGE_BYTES)
        return done

    with ThreadPoolExecutor(in_flight, "moeflow-measure") as threads:
        reads = [threads.submit(read, number) for number in range(in_flight)]
        begin = time.perf_counter()
        end = begin + seconds
        ready.wait()
        total = sum(one.result() for one in reads)
        return total / (time.perf_counter() - begin)


def _read(file: int, memory: memoryview, begin: int) -> int:
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], begin + done)
        if not count:
            raise OSError(5, "the file ended early")
        done += count
    return done


def _buffer(num_bytes: int) -> memoryview:
    """Return memory at a page, on huge pages where there are any, each page touched."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    np.frombuffer(view, np.uint8).fill(0)
    return view
