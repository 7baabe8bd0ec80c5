"""The read of one expert: its parts, and what each brings to the record.

Knows piece tables and memory. Opens no file.
"""

from collections.abc import Callable

import numpy as np

from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.reading.parts import Part, merged, parts_of
from moeflow.core import PAGE_BYTES

Run = tuple[int, int]  # begin and end of bytes of the record


class ExpertRead:
    """One expert on its way from files to a record, straight or through a buffer.

    Args:
        source: of its layer.
        expert: its number.
        record: uint8 [>= record.num_bytes], written.
        buffer: gives memory of so many bytes, at a page.
        part_bytes: the most bytes of a part; None reads each contiguous range at once.

    Attributes:
        parts: what is to be read.
        files: numbers of all its files.
    """

    def __init__(
        self,
        source: LayerSource,
        expert: int,
        record: np.ndarray,
        buffer: Callable[[int], np.ndarray],
        part_bytes: int | None,
    ) -> None:
        self._source, self._expert, self._record = source, expert, record
        tables = list(source.pieces())
        self._sizes = [table.bytes_of(expert) for table in tables]
        places = [(table.files[expert], table.begins[expert]) for table in tables]
        self.files = {file for file, _ in places}
        extents, self._places = merged([(*place, size) for place, size in zip(places, self._sizes, strict=True)])
        room = sum(extent.room for extent in extents)
        self._in_place = (
            len(tables) == len(extents) == len(source.copies) == 1
            and extents[0].begin == extents[0].page
            and record.ctypes.data % PAGE_BYTES == 0
            and record.nbytes >= room
        )
        self._extents, self._memory, begin = extents, [], 0
        memory = record if self._in_place else buffer(room)
        for extent in extents:
            self._memory.append(memory[begin : begin + extent.room])
            begin += extent.room
        self.parts = parts_of(extents, self._memory, part_bytes)

    def take(self, part: Part) -> list[Run]:
        """Bring what a part holds to its places in the record; return what has arrived there."""
        if self._source.conversions:
            return []
        extent, runs = self._extents[part.extent], []
        if self._in_place:
            return [(part.begin - extent.begin, part.end - extent.begin)]
        raw = np.frombuffer(part.memory, np.uint8)
        for (_, offset), place, size in zip(self._source.copies, self._places, self._sizes, strict=True):
            if place.extent != part.extent:
                continue
            piece = extent.begin + place.offset  # where it begins in the file
            begin, end = max(piece, part.begin), min(piece + size, part.end)
            if begin < end:
                run = (offset + begin - piece, offset + end - piece)
                self._record[slice(*run)] = raw[begin - part.begin : end - part.begin]
                runs.append(run)
        return runs

    def finish(self) -> list[Run]:
        """Make what arithmetic makes of the pieces, when all parts are read; return what has arrived by that."""
        if not self._source.conversions:
            return []
        raw = []
        for place, size in zip(self._places, self._sizes, strict=True):
            extent = self._extents[place.extent]
            begin = extent.begin - extent.page + place.offset
            raw.append(self._memory[place.extent][begin : begin + size])
        self._source.fill(self._expert, raw, self._record)
        return [(0, self._source.layout.record_of(self._expert).num_bytes)]
