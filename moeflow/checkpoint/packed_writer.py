"""Writes a packed model folder: the dense weights as they are, and one aligned, checksummed record an expert.

The writer fills `OUT.partial` under a lock and renames it when it is whole. It goes shard by shard, so that a shard is
needed for a while only. After a kill in any line, the next run of the same inputs goes on at the first tensor or expert
whose bytes on disk are not those of the journal.

Knows checkpoints and layer sources. Knows nothing of models.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from moeflow import __version__
from moeflow.atomic_file import sync_file, sync_folder
from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.checkpoint.headers import Checkpoint
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.pack_journal import JOURNAL, PackJournal, is_of_run
from moeflow.checkpoint.packed_file import PACKED_FILE, header_bytes, record_offsets, stride
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.store import ExpertStore
from moeflow.checkpoint.writing.dense_file import DenseFile
from moeflow.checkpoint.writing.parts import Part, cut_turns, order_parts, shards_of
from moeflow.checkpoint.writing.shards import LocalShards, Shards, name_of
from moeflow.core import ExpertKey
from moeflow.errors import ConfigError, MoeflowError
from moeflow.file_lock import exclusive
from moeflow.progress import ProgressCallback

logger = logging.getLogger(__name__)

_COPIED_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_READS_IN_FLIGHT = 4


def check_output(out: Path) -> None:
    """Refuse a folder that is there, before anything is read.

    Raises:
        ConfigError: `out` exists.
    """
    if os.path.lexists(out) and not (out / JOURNAL).is_file():  # with one, a run was killed in its last step
        _refuse_existing(out)


def write_packed(
    checkpoint: Checkpoint,
    layers: list[LayerSource],
    feeding: set[str],
    out: Path,
    *,
    packed: tuple[Path, FileStamp] | None = None,
    shards: Shards | None = None,
    settings: str = "",
    architecture: str | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a folder of records and of all tensors that feed no expert.

    Args:
        checkpoint: to copy from.
        layers: [num_layers], the sources of records.
        feeding: names of the tensors that feed experts.
        out: the folder to write.
        packed: the packed file that the layers lie in, and its stamp when its header was read; None where they lie in
            the checkpoint's own files.
        shards: brings the checkpoint's files; None where they are on this disk.
        architecture: of the GGUF file that the checkpoint's tensors lie in, as it names it; dense ones go into a GGUF
            file again. None for safetensors.
        settings: everything else that decides the records' bytes; a partial folder of other settings is not continued.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: `out` exists, another process writes it, or its disk is too small.
        MoeflowError: the disk became full or failed, or a shard could not be had; `out` is not there, `OUT.partial`
            continues on the next run.
    """
    partial = out.with_name(out.name + ".partial")

    def refuse() -> NoReturn:
        raise ConfigError(f"{out} is being written by another process. Wait for it, or give another folder.")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(out.name + ".lock"), on_taken=refuse):
            shards = shards or LocalShards(checkpoint.files, checkpoint.stamps)
            run = _run_name(checkpoint, shards, packed, layers, settings)
            if not os.path.lexists(out):
                _Writer(partial, checkpoint, layers, feeding, shards, packed, architecture, progress).fill(run)
                os.rename(partial, out)
                sync_folder(out.parent)
            elif not is_of_run(out, run):
                _refuse_existing(out)
            shards.finish()
        (out / JOURNAL).unlink(missing_ok=True)  # the last step: with it the next run knows a whole folder as its own
    except OSError as error:
        remedy = "Give a folder of yours, on a disk with room."
        if partial.exists():
            remedy = (
                f"What is done is kept in {partial}: make room and run the same command again, or remove that folder."
            )
        raise MoeflowError(f"{out} could not be written: {error.strerror or error}. {remedy}") from error
    return out


def _refuse_existing(out: Path) -> NoReturn:
    raise ConfigError(f"{out} exists. Give a folder that does not, or remove it.")


class _Writer:
    """Writes everything into the partial folder, or what an earlier run of the same name left undone."""

    def __init__(
        self,
        partial: Path,
        checkpoint: Checkpoint,
        layers: list[LayerSource],
        feeding: set[str],
        shards: Shards,
        packed: tuple[Path, FileStamp] | None,
        architecture: str | None,
        progress: ProgressCallback | None,
    ) -> None:
        self._partial, self._checkpoint, self._layers = partial, checkpoint, layers
        self._shards, self._packed, self._architecture = shards, packed, architecture
        self._layouts = [source.layout for source in layers]
        tensors = {name: entry for name, entry in checkpoint.tensors.items() if name not in feeding}
        self._dense = DenseFile(partial, tensors, architecture)
        self._experts = partial / PACKED_FILE
        self._offsets, self._experts_end = record_offsets(self._layouts, len(header_bytes(self._layouts)))
        self._parts = order_parts(tensors, layers, packed=packed is not None)
        total = sum(entry.num_bytes for entry in tensors.values()) + self._experts_end
        self._report = _Report(progress, total)

    def fill(self, run: str) -> None:
        """Write; `run` names the inputs."""
        with closing(PackJournal(self._partial, run)) as journal:
            journal.keep_intact([self._place(part) for part in self._parts], self._report_kept)
            if journal.sums:
                logger.info("continuing %s after %d tensors and experts", self._partial, len(journal.sums))
            turns = cut_turns(self._parts[len(journal.sums) :])
            self._plan(turns, fresh=not journal.sums)
            self._copy_small_files()
            with _open_to_write(self._dense.path) as dense, _open_to_write(self._experts) as experts:
                dense.truncate(self._dense.num_bytes)
                _write_at(dense, 0, self._dense.head)
                experts.truncate(self._experts_end)
                for number, turn in enumerate(turns):
                    files = self._shards.take(number)
                    self._write_dense(turn, files, dense, journal)
                    self._write_experts(turn, files, experts, journal)
                    os.fsync(dense.fileno())
                    os.fsync(experts.fileno())
                    journal.sync()
                    self._shards.drop(number)
                sums = dict(zip((part.what for part in self._parts), journal.sums, strict=True))
                by_layer = [
                    [sums[ExpertKey(number, expert)] for expert in range(layout.num_experts)]
                    for number, layout in enumerate(self._layouts)
                ]
                _write_at(experts, 0, header_bytes(self._layouts, by_layer))
        for file in self._partial.iterdir():
            sync_file(file)
        sync_folder(self._partial)

    def _place(self, part: Part) -> tuple[Path, int, int]:
        """Return file, offset and bytes of what is written for a part."""
        if isinstance(part.what, str):
            return (self._dense.path, *self._dense.place(part.what))
        layer, expert = part.what
        return self._experts, self._offsets[layer][expert], self._layouts[layer].record_of(expert).num_bytes

    def _report_kept(self, number: int) -> None:
        what = self._parts[number].what
        if isinstance(what, str):
            self._report.add(self._dense.tensors[what].num_bytes)
        else:
            self._report.add(stride(self._layouts[what.layer], what.expert))

    def _plan(self, turns: list[list[Part]], *, fresh: bool) -> None:
        written = sum(file.stat().st_blocks * 512 for file in self._partial.iterdir())
        more_bytes = max(0, self._report.total - written)
        try:
            self._shards.plan([shards_of(turn) for turn in turns], self._partial, more_bytes)
        except MoeflowError:
            if fresh:
                shutil.rmtree(self._partial)
            raise

    def _copy_small_files(self) -> None:
        for pattern in _COPIED_FILES:
            for file in self._checkpoint.folder.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, self._partial / file.name)
        if self._architecture is not None:
            told = {"version": 1, "files": [self._dense.path.name], "sizes": [self._dense.num_bytes]}
            (self._partial / GGUF_FILE).write_text(json.dumps(told, indent=2) + "\n")

    def _write_dense(self, turn: list[Part], files: list[Path], target: BinaryIO, journal: PackJournal) -> None:
        """Copy a turn's dense tensors."""
        for part in turn:
            if isinstance(part.what, str):
                journal.add(self._dense.copy(part.what, files, target, self._report.add))

    def _write_experts(self, turn: list[Part], files: list[Path], target: BinaryIO, journal: PackJournal) -> None:
        """Write a turn's records, in order; several are made at once."""
        keys = [part.what for part in turn if isinstance(part.what, ExpertKey)]
        stamps = self._shards.stamps
        if self._packed is not None:
            files, stamps = [self._packed[0]], [self._packed[1]]
        store = ExpertStore(files, self._layers, stamps=stamps)
        threads = ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="moeflow-pack")
        waiting: deque[tuple[ExpertKey, Future[np.ndarray]]] = deque()

        def read(key: ExpertKey) -> np.ndarray:
            record = np.zeros(stride(self._layouts[key.layer], key.expert), np.uint8)
            store.read(key, record)
            return record

        def write_next() -> None:
            key, future = waiting.popleft()
            record = future.result()
            _write_at(target, self._offsets[key.layer][key.expert], record.data)
            journal.add(zlib.crc32(record[: self._layouts[key.layer].record_of(key.expert).num_bytes].data))
            self._report.add(record.nbytes)

        try:
            for key in keys:
                waiting.append((key, threads.submit(read, key)))
                if len(waiting) == _READS_IN_FLIGHT:
                    write_next()
            while waiting:
                write_next()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            store.close()


class _Report:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: ProgressCallback | None, total: int) -> None:
        self._progress, self.total, self._done = progress, total, 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress:
            self._progress(self._done, self.total)


def _run_name(
    checkpoint: Checkpoint,
    shards: Shards,
    packed: tuple[Path, FileStamp] | None,
    layers: list[LayerSource],
    settings: str,
) -> str:
    """Hash the inputs: a partial folder of other inputs must not be continued."""
    names = [*shards.names, *([] if packed is None else [name_of(packed[0])])]
    inputs: list[Any] = [__version__, names, checkpoint.tensors, [source.layout for source in layers], settings]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _open_to_write(file: Path) -> BinaryIO:
    """Open a file, with what is in it."""
    return open(file, "r+b" if file.exists() else "w+b")


def _write_at(target: BinaryIO, offset: int, content: bytes | memoryview) -> None:
    target.seek(offset)
    target.write(content)
    target.flush()
