"""Parts of one expert's read: few byte ranges of files, whole or cut at pages.

Knows numbers and memory. Opens no file.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from moeflow.core import PAGE_BYTES, align_up

# Pieces of one file that lie this close are one read: the gap costs less than a second request.
COALESCE_GAP_BYTES = 128 * 1024


class Extent(NamedTuple):
    """One contiguous byte range: file number, begin and end."""

    file: int
    begin: int
    end: int

    @property
    def page(self) -> int:
        """Where the page of its first byte begins."""
        return self.begin - self.begin % PAGE_BYTES

    @property
    def room(self) -> int:
        """Bytes of memory that it is read into: whole pages."""
        return align_up(self.end - self.page, PAGE_BYTES)


class Place(NamedTuple):
    """Where a piece lies: in which extent, and at which of its bytes."""

    extent: int
    offset: int


class Part(NamedTuple):
    """One read: bytes from `begin`, at a page, to `end` of a file, into memory of whole pages.

    `extent`: number of the extent that it is a part of.
    """

    extent: int
    file: int
    begin: int
    end: int
    memory: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes taken from the disk."""
        return self.end - self.begin


# Runs a function on parts and yields those that are done. Closed early, it begins no other and lets running ones end.
Share = Callable[[Callable[[Part], None], list[Part]], Generator[Part, None, None]]


def one_by_one(run: Callable[[Part], None], parts: list[Part]) -> Generator[Part, None, None]:
    """Run a function on parts in the calling thread, in order; yield each when it is done."""
    for part in parts:
        run(part)
        yield part


def merged(pieces: list[tuple[int, int, int]]) -> tuple[list[Extent], list[Place]]:
    """Merge pieces that lie close into few extents.

    Args:
        pieces: file number, begin and number of bytes of each.

    Returns:
        The extents, and the place of each piece.
    """
    extents: list[Extent] = []
    for file, begin, num_bytes in sorted(pieces):
        last = extents[-1] if extents else None
        if last and last.file == file and begin - last.end <= COALESCE_GAP_BYTES:
            extents[-1] = Extent(file, last.begin, max(last.end, begin + num_bytes))
        else:
            extents.append(Extent(file, begin, begin + num_bytes))
    places = []
    for file, begin, _ in pieces:
        number = next(i for i, e in enumerate(extents) if e.file == file and e.begin <= begin < e.end)
        places.append(Place(number, begin - extents[number].begin))
    return extents, places


def parts_of(extents: list[Extent], memory: list[np.ndarray], part_bytes: int | None) -> list[Part]:
    """Cut extents into parts of about one size.

    Args:
        extents: what is read.
        memory: uint8 [its room] for each extent.
        part_bytes: the most bytes of a part; None leaves each extent whole.
    """
    parts = []
    for number, (extent, room) in enumerate(zip(extents, memory, strict=True)):
        count = 1 if part_bytes is None else max(-(-extent.room // part_bytes), 1)
        step = align_up(-(-extent.room // count), PAGE_BYTES)
        for begin in range(extent.page, extent.end, step):
            end = min(begin + step, extent.end)
            view = room.data[begin - extent.page : align_up(end - extent.page, PAGE_BYTES)]
            parts.append(Part(number, extent.file, begin, end, view))
    return parts
