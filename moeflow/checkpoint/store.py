"""Reads experts from disk: each whole, several at a time, past the page cache where the filesystem allows.

Knows files and bytes. Knows nothing of models, caches or devices; torch is not imported here.
"""

import contextlib
import errno
import io
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.reading.expert_read import ExpertRead
from moeflow.checkpoint.reading.file_stamp import FileStamp, check_stamps
from moeflow.checkpoint.reading.parts import Part, Share, one_by_one
from moeflow.core import PAGE_BYTES, ExpertKey, align_up
from moeflow.errors import CheckpointError, ClosedModelError, ExpertReadError

_HUGE_PAGE_BYTES = 2 << 20  # direct reads into small pages, scattered in memory, are up to twice as slow
_CLOSED = "the model was closed: load it again to use it."


class _DiskError(Exception):
    """The number of a file and the OSError that it gave. What `landed` raises is not the disk's."""


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

    def read(
        self,
        key: ExpertKey,
        record: np.ndarray,
        *,
        landed: Callable[[int, int], None] | None = None,
        share: Share = one_by_one,
        part_bytes: int | None = None,
    ) -> int:
        """Fill `record` with one expert.

        Args:
            key: the expert.
            record: uint8 [>= layout.num_bytes], contiguous; aligned to a page and with room up to the next page
                it is read into without a copy.
            landed: called in this thread with the begin and end of bytes of the record that have arrived, while others
                are still read. They are known to be right only when this method returns.
            share: runs the parts.
            part_bytes: the most bytes of a part; None reads each contiguous range at once.

        Returns:
            Bytes taken from the disk.

        Raises:
            ExpertReadError: the disk failed, the file changed, or a checksum does not agree.
            ClosedModelError: the store was closed.
        """
        source = self.layers[key.layer]
        reading = ExpertRead(source, key.expert, record, self._buffer, part_bytes)
        try:
            with closing(share(self._read_part, reading.parts)) as done:
                for part in done:
                    for begin, end in reading.take(part):
                        if landed is not None:
                            landed(begin, end)
            self._check_unchanged(source, key.expert, reading.files)
        except _DiskError as failure:
            file, error = failure.args
            with contextlib.suppress(_DiskError):
                self._check_unchanged(source, key.expert, reading.files)
            raise ExpertReadError(
                f"expert {key.expert} of {source.layout.name} could not be read from {self.files[file]}: "
                f"{error.strerror or error}. The model stays usable: check the disk and call again."
            ) from error
        for begin, end in reading.finish():
            if landed is not None:
                landed(begin, end)
        self._check(source, key, record)
        return sum(part.num_bytes for part in reading.parts)

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

    def file_of(self, key: ExpertKey) -> Path:
        """Return the file in which an expert begins."""
        return self.files[next(self.layers[key.layer].pieces()).files[key.expert]]

    def _buffer(self, num_bytes: int) -> np.ndarray:
        buffer = getattr(self._staging, "buffer", None)
        if buffer is None or buffer.nbytes < num_bytes:
            num_bytes = align_up(num_bytes, _HUGE_PAGE_BYTES)  # else the system may give huge pages to none of it
            with self._lock:
                self._staging_bytes += num_bytes - (buffer.nbytes if buffer is not None else 0)
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            buffer = self._staging.buffer = np.frombuffer(memory, np.uint8)
        return buffer

    def _read_part(self, part: Part) -> None:
        """Read until the part's end is in its memory, which may be a little longer."""
        begun, needed, done = time.perf_counter(), part.num_bytes, 0
        try:
            while done < needed:
                done = self._read_some(part, done)
        except OSError as error:
            raise _DiskError(part.file, error) from error
        with self._lock:
            self._reads += 1
            self._bytes_read += needed
            self._read_s += time.perf_counter() - begun

    def _read_some(self, part: Part, done: int) -> int:
        """Read on where `done` bytes of a part are there; return how many are there now."""
        try:
            count = os.preadv(self._descriptor(part.file), [part.memory[done:]], part.begin + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct[part.file]:
                raise
            self._give_up_direct(part.file)
            return done
        end = done + count
        if end < part.num_bytes:
            end -= end % PAGE_BYTES  # a direct read goes on at a page
            if end <= done:
                missing = part.num_bytes - done - count
                raise OSError(errno.EIO, f"the file ends {missing} bytes early, it was truncated")
        return end

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
            try:
                now = FileStamp.of(self._descriptor(file))
            except OSError as error:
                raise _DiskError(file, error) from error
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
                    f"expert {key.expert} of {source.layout.name} in {self.file_of(key)}: {error}"
                ) from error
        self._verified.add(key)

    def _check_sum(self, source: LayerSource, key: ExpertKey, record: np.ndarray) -> None:
        assert source.crc32 is not None, "a source with checksums"
        found = zlib.crc32(record[: source.layout.record_of(key.expert).num_bytes].data)
        if found != source.crc32[key.expert]:
            raise ExpertReadError(
                f"expert {key.expert} of {source.layout.name} is corrupt in {self.file_of(key)}: "
                f"checksum {found:08x}, expected {source.crc32[key.expert]:08x}. Write the file again "
                "with moeflow pack."
            )


def _open_direct(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_DIRECT)
