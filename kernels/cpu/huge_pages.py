"""Memory that the processor finds faster: a matrix on pages of 2 MB is read up to a fifth faster than on those of 4 KB.

Knows addresses. Knows nothing of tensors.
"""

import ctypes
import sys

from moeflow.core import align_up

PAGE_BYTES = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1


def use_huge_pages(ranges: list[tuple[int, int]]) -> int:
    """Ask the system to move memory to huge pages; addresses and what lies there stay the same.

    Huge pages that the ranges fill less than half stay as they are. A system that has none does nothing.

    Args:
        ranges: address and bytes of each.

    Returns:
        Bytes of what the system has moved, or had there before.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for begin, end in _runs(_filled(ranges)):
        if madvise(begin, end - begin, _COLLAPSE) == 0:
            moved += end - begin
    return moved


def _filled(ranges: list[tuple[int, int]]) -> list[int]:
    """Return the addresses of huge pages that ranges fill at least half, in rising order."""
    filled: dict[int, int] = {}
    for begin, num_bytes in ranges:
        for page in range(begin // PAGE_BYTES * PAGE_BYTES, align_up(begin + num_bytes, PAGE_BYTES), PAGE_BYTES):
            within = min(begin + num_bytes, page + PAGE_BYTES) - max(begin, page)
            filled[page] = filled.get(page, 0) + within
    return sorted(page for page, count in filled.items() if 2 * count >= PAGE_BYTES)


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Join neighbours: begin and end of each run."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + PAGE_BYTES
        else:
            runs.append((page, page + PAGE_BYTES))
    return runs
