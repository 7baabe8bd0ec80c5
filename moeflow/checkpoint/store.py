"""Reads experts from disk: each whole, several at a time, past the page cache where the filesystem allows.

Knows files and bytes. Knows nothing of models, caches or devices; torch is not imported here.
"""

import errno
import io
import mmap
import os
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeflow.checkpoint.file_stamp import FileStamp, check_stamps
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.core import PAGE_BYTES, ExpertKey, align_up
from moeflow.errors import CheckpointError, ClosedModelError, ExpertReadError

# Pieces of one file that lie this close are one read: the gap costs less than a second request.
COALESCE_GAP_BYTES = 128 * 1024
_CLOSED = "the model was closed: load it again to use it."


class Extent(NamedTuple):
    """One contiguous read: file number and absolute byte range."""

    file: int
    begin: int
    end: int


class ExpertStore:
    """Reads one expert's record into memory the caller owns. Safe to call from many threads.

    The files stay open until `close`, so that it does not matter what becomes of their names.

    Args:
        files: the files the layers' piece tables number.
        layers: [num_layers], where each expert's bytes come from.
        stamps: of the files when their headers were read; None takes them as they are now.
        direct: read with O_DIRECT where the filesystem takes it.

    Attributes:
        stamps: of the files, as they were opened.

    Raises:
        CheckpointError: a file cannot be opened, or is not the one that it was.
    """

    def __init__(
        self,
        files: list[Path],
        layers: list[LayerSource],
        *,
        stamps: list[FileStamp] | None = None,
        direct: bool = True,
    ) -> None:
        self.files = [Path(file) for file in files]
        self.layers = layers
        self._lock = threading.Lock()
        self._staging = threading.local()
        self._staging_bytes = 0
        self._reads = self._bytes_read = 0
        self._read_s = 0.0
        self._verified: set[ExpertKey] = set()
        self._opened: list[io.FileIO] = []
        self._direct = [direct and hasattr(os, "O_DIRECT")] * len(self.files)
        try:
            for number in range(len(self.files)):
                self._opened.append(self._open(number))
            self.stamps = [FileStamp.of(opened.fileno()) for opened in self._opened]
            check_stamps(self.files, stamps or self.stamps, self.stamps)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CheckpointError(f"{error.filename} cannot be opened: {error.strerror}.") from error
            raise

    @property
    def mode(self) -> str:
        """How files are read: "direct", "buffered", or "direct and buffered" where filesystems differ."""
        return " and ".join(name for flag, name in ((True, "direct"), (False, "buffered")) if flag in self._direct)

    def stats(self) -> dict:
        """Return counts since the store was opened; times are summed over reading threads, in seconds."""
        return {"mode": self.mode, "reads": self._reads, "bytes": self._bytes_read, "read_s": self._read_s}

    @property
    def staging_bytes(self) -> int:
        """Bytes of read buffers held by the reading threads."""
        return self._staging_bytes

    def read(self, key: ExpertKey, record: np.ndarray) -> int:
        """Fill `record` with one expert.

        Args:
            key: the expert.
            record: uint8 [>= layout.num_bytes], contiguous; aligned to a page and with room up to the next page
                it is read into without a copy.

        Returns:
            Bytes taken from the disk.

        Raises:
            ExpertReadError: the disk failed, the file changed, or a checksum does not agree.
            ClosedModelError: the store was closed.
        """
        source = self.layers[key.layer]
        try:
            begin = time.perf_counter()
            extents, places = self._plan(source, key.expert)
            if self._lands_in_place(source, extents, record):
                num_bytes, raw = self._read_in_place(extents[0], record), None
            else:
                num_bytes, raw = self._read_staged(extents)
            taken = time.perf_counter() - begin
            self._check_unchanged(source, key.expert, {extent.file for extent in extents})
            if raw is not None:
                sizes = [table.bytes_of(key.expert) for table in source.pieces()]
                pieces = [
                    raw[number][offset : offset + size] for (number, offset), size in zip(places, sizes, strict=True)
                ]
                source.fill(key.expert, pieces, record)
        except OSError as error:
            self._check_unchanged(source, key.expert, {table.files[key.expert] for table in source.pieces()})
            raise ExpertReadError(
                f"expert {key.expert} of {source.layout.name} could not be read from "
                f"{self.files[self._file_of(source, key.expert)]}: {error.strerror or error}. The model stays usable: "
                "check the disk and call again."
            ) from error
        self._check(source, key, record)
        with self._lock:
            self._reads += len(extents)
            self._bytes_read += num_bytes
            self._read_s += taken
        return num_bytes

    def after_fork(self) -> None:
        """Begin anew in the child of a fork: the lock and the buffers of threads that are not there.

        The files stay open: each read says its place itself, so that the parent's reads do not move the child's.
        """
        self._lock, self._staging, self._staging_bytes = threading.Lock(), threading.local(), 0

    def close(self) -> None:
        """Close the files; no read may be under way. Reads that come later raise ClosedModelError.

        After an interrupt in here, a second call closes the others.
        """
        with self._lock:
            for opened in self._opened:
                opened.close()

    @staticmethod
    def _file_of(source: LayerSource, expert: int) -> int:
        return next(source.pieces()).files[expert]

    def _plan(self, source: LayerSource, expert: int) -> tuple[list[Extent], list[tuple[int, int]]]:
        """Merge an expert's pieces into few extents; return those, and where each piece lies (extent, offset)."""
        pieces = [(t.files[expert], t.begins[expert], t.bytes_of(expert)) for t in source.pieces()]
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
            places.append((number, begin - extents[number].begin))
        return extents, places

    @staticmethod
    def _lands_in_place(source: LayerSource, extents: list[Extent], record: np.ndarray) -> bool:
        return (
            len(extents) == 1
            and len(source.copies) == 1
            and not source.conversions
            and extents[0].begin % PAGE_BYTES == 0
            and record.ctypes.data % PAGE_BYTES == 0
            and record.nbytes >= align_up(extents[0].end - extents[0].begin, PAGE_BYTES)
        )

    def _read_in_place(self, extent: Extent, record: np.ndarray) -> int:
        return self._pread(extent, record.data[: align_up(extent.end - extent.begin, PAGE_BYTES)], extent.begin)

    def _read_staged(self, extents: list[Extent]) -> tuple[int, list[np.ndarray]]:
        """Read every extent into this thread's page-aligned buffer; return the bytes and a view per extent."""
        starts = [extent.begin - extent.begin % PAGE_BYTES for extent in extents]
        sizes = [align_up(extent.end - start, PAGE_BYTES) for extent, start in zip(extents, starts, strict=True)]
        buffer, views, offset, num_bytes = self._buffer(sum(sizes)), [], 0, 0
        for extent, start, size in zip(extents, starts, sizes, strict=True):
            num_bytes += self._pread(extent, buffer.data[offset : offset + size], start)
            first = offset + extent.begin - start
            views.append(buffer[first : first + extent.end - extent.begin])
            offset += size
        return num_bytes, views

    def _buffer(self, num_bytes: int) -> np.ndarray:
        buffer = getattr(self._staging, "buffer", None)
        if buffer is None or buffer.nbytes < num_bytes:
            with self._lock:
                self._staging_bytes += num_bytes - (buffer.nbytes if buffer is not None else 0)
            buffer = self._staging.buffer = np.frombuffer(
                mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8
            )
        return buffer

    def _pread(self, extent: Extent, view: memoryview, start: int) -> int:
        """Read from `start` until the extent's end is in `view`, which may be a little longer."""
        fd, needed, done = self._descriptor(extent.file), extent.end - start, 0
        while done < needed:
            try:
                count = os.preadv(fd, [view[done:]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct[extent.file]:
                    raise
                self._give_up_direct(extent.file)
                continue
            end = done + count
            if end < needed:
                end -= end % PAGE_BYTES  # a direct read goes on at a page
                if end <= done:
                    raise OSError(errno.EIO, f"the file ends {needed - done - count} bytes early, it was truncated")
            done = end
        return needed

    def _open(self, file: int) -> io.FileIO:
        if self._direct[file]:
            try:
                return io.FileIO(self.files[file], opener=_open_direct)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct[file] = False
        return io.FileIO(self.files[file])

    def _descriptor(self, file: int) -> int:
        opened = self._opened[file]
        if opened.closed:
            raise ClosedModelError(_CLOSED)
        return opened.fileno()

    def _give_up_direct(self, file: int) -> None:
        """Give up direct reads of one file: some filesystems take the flag and refuse the read."""
        import fcntl  # not on Windows, which has no such flag

        with self._lock:
            fd = self._descriptor(file)
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._direct[file] = False

    def _check_unchanged(self, source: LayerSource, expert: int, files: Iterable[int]) -> None:
        """Compare files with what they were when the model was loaded, after bytes were read from them."""
        for file in files:
            now = FileStamp.of(self._descriptor(file))
            if now != self.stamps[file]:
                raise ExpertReadError(
                    f"expert {expert} of {source.layout.name} could not be read: {self.files[file]} changed on disk "
                    f"after the model was loaded ({self.stamps[file].change_to(now)}). Old and new weights must not "
                    "be mixed: load the model again."
                )

    def _check(self, source: LayerSource, key: ExpertKey, record: np.ndarray) -> None:
        """Compare a record with its checksum, and look into it, the first time it is read."""
        if key in self._verified:
            return
        if source.crc32 is not None:
            self._check_sum(source, key, record)
        if source.check is not None:
            try:
                source.check(key.expert, record)
            except CheckpointError as error:
                raise ExpertReadError(
                    f"expert {key.expert} of {source.layout.name} in {self.files[self._file_of(source, key.expert)]}: "
                    f"{error}"
                ) from error
        self._verified.add(key)

    def _check_sum(self, source: LayerSource, key: ExpertKey, record: np.ndarray) -> None:
        assert source.crc32 is not None, "a source with checksums"
        found = zlib.crc32(record[: source.layout.record_of(key.expert).num_bytes].data)
        if found != source.crc32[key.expert]:
            raise ExpertReadError(
                f"expert {key.expert} of {source.layout.name} is corrupt in "
                f"{self.files[self._file_of(source, key.expert)]}: "
                f"checksum {found:08x}, expected {source.crc32[key.expert]:08x}. Write the file again "
                "with moeflow pack."
            )


def _open_direct(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_DIRECT)
