"""Bytes a second that the compiled kernels read from memory, for each number of threads, and that fresh memory takes.

Knows torch's threads and the sizes of caches. Knows nothing of weights.
"""

import contextlib
import mmap
import time
from itertools import cycle
from pathlib import Path

import torch

from moeflow.hardware import available_memory_bytes
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import library
from moeflow.machine.measuring.timing import median_seconds

_LEAST_BYTES, _MOST_BYTES = 32 << 20, 1 << 30
_PAGE_BYTES = 4096
_PIECE_BYTES, _THREADS_BYTES = 16 << 20, 4 << 20  # of a reading: short, so that the system seldom interrupts it


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip()[:-1]) << 10 for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    return max(sizes, default=32 << 20)


def beyond_cache_bytes(times: int = 8) -> int:
    """Return the size of a block that no cache holds, and that leaves room in memory.

    Args:
        times: the last-level cache that it wants to be.
    """
    room = available_memory_bytes() // 8
    return max(min(times * last_level_cache_bytes(), room, _MOST_BYTES), _LEAST_BYTES)


def memory_read(most_threads: int, seconds: float) -> dict[int, float]:
    """Measure reads of memory by 1, 2, 4 ... threads, and by the most.

    Args:
        most_threads: that may run.
        seconds: for all of them.

    Returns:
        Threads -> bytes a second. torch's threads are as many as before.
    """
    counts = sorted({2**power for power in range(most_threads.bit_length())} | {most_threads})
    block, before = torch.ones(beyond_cache_bytes() // 8, dtype=torch.int64), torch.get_num_threads()
    try:
        found = {}
        for count in counts:
            torch.set_num_threads(count)
            found[count] = _read_rate(block, count, seconds / len(counts))
    finally:
        torch.set_num_threads(before)
    return found


def memory_touch(seconds: float) -> float:
    """Return the bytes a second at which memory that nobody has used is first written, page by page, in huge pages.

    What is written is held until the end: the system hands out faster what it has just got back.

    Args:
        seconds: to spend on it.
    """
    size = min(_MOST_BYTES, max(available_memory_bytes() // 8, _LEAST_BYTES))
    with contextlib.closing(mmap.mmap(-1, size)) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        begin = time.perf_counter()
        for end in range(_PIECE_BYTES, size + 1, _PIECE_BYTES):
            for place in range(end - _PIECE_BYTES, end, _PAGE_BYTES):
                memory[place] = 1
            taken = time.perf_counter() - begin
            if taken > seconds:
                break
        return end / taken


def _read_rate(block: torch.Tensor, num_threads: int, seconds: float) -> float:
    """Return bytes a second of readings of a block, piece by piece."""
    pieces = block.split(max(num_threads * _THREADS_BYTES, _PIECE_BYTES) // 8)
    turn = cycle(pieces[:-1] or pieces)  # the last one may be shorter

    def read() -> None:
        piece = next(turn)
        if library() is None:
            piece.sum()
        else:
            cpu.read(piece)

    return pieces[0].nbytes / median_seconds(read, seconds)
