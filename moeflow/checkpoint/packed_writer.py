"""Writes a packed model folder: the dense weights as they are, and one aligned, checksummed record an expert.

The writer fills `OUT.partial` under a lock and renames it when it is whole. After a kill in any line, the next run of
the same inputs goes on at the first expert whose bytes on disk are not those of the journal.

Knows checkpoints and layer sources. Knows nothing of models.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial as partial_of
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from moeflow import __version__
from moeflow.atomic_file import sync_file, sync_folder
from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.checkpoint.gguf.writing import head as gguf_head
from moeflow.checkpoint.headers import SINGLE_FILE, Checkpoint, TensorEntry
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.pack_journal import JOURNAL, PackJournal, is_of_run
from moeflow.checkpoint.packed_file import PACKED_FILE, header_bytes, record_offsets, stride
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, LayerLayout, align_up
from moeflow.errors import ConfigError, MoeflowError
from moeflow.file_lock import exclusive
from moeflow.progress import ProgressCallback

logger = logging.getLogger(__name__)

DENSE_GGUF = "dense.gguf"
_COPIED_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_READS_IN_FLIGHT = 4
_COPY_CHUNK_BYTES = 16 << 20


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
        architecture: of the GGUF file that the checkpoint's tensors lie in, as it names it; dense ones go into a GGUF
            file again. None for safetensors.
        settings: everything else that decides the records' bytes; a partial folder of other settings is not continued.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: `out` exists, another process writes it, or its disk is too small.
        MoeflowError: the disk became full or failed; `out` is not there, `OUT.partial` continues on the next run.
    """
    partial = out.with_name(out.name + ".partial")

    def refuse() -> NoReturn:
        raise ConfigError(f"{out} is being written by another process. Wait for it, or give another folder.")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(out.name + ".lock"), on_taken=refuse):
            files, stamps = (checkpoint.files, checkpoint.stamps) if packed is None else ([packed[0]], [packed[1]])
            run = _run_name(checkpoint, files, [source.layout for source in layers], settings)
            if not os.path.lexists(out):
                store = partial_of(ExpertStore, files, layers, stamps=stamps)
                _fill(partial, run, checkpoint, layers, store, feeding, architecture, progress)
                os.rename(partial, out)
                sync_folder(out.parent)
            elif not is_of_run(out, run):
                _refuse_existing(out)
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


def _fill(
    partial: Path,
    run: str,
    checkpoint: Checkpoint,
    layers: list[LayerSource],
    open_store: Callable[[], ExpertStore],
    feeding: set[str],
    architecture: str | None,
    progress: ProgressCallback | None,
) -> None:
    """Write everything into the partial folder, or what an earlier run of the same name left undone."""
    layouts = [source.layout for source in layers]
    dense = [name for name in checkpoint.tensors if name not in feeding]
    offsets, experts_end = record_offsets(layouts, len(header_bytes(layouts)))
    total = sum(checkpoint.tensors[name].num_bytes for name in dense) + experts_end
    report = _Report(progress, total)
    keys = [ExpertKey(number, expert) for number, layout in enumerate(layouts) for expert in range(layout.num_experts)]
    records = [(offsets[key.layer][key.expert], layouts[key.layer].record_of(key.expert).num_bytes) for key in keys]
    with closing(PackJournal(partial, run)) as journal:
        journal.keep_intact(
            partial / PACKED_FILE,
            records,
            lambda number: report.add(stride(layouts[keys[number].layer], keys[number].expert)),
        )
        if journal.sums:
            logger.info("continuing %s after %d experts", partial, len(journal.sums))
        _check_space(partial, total, fresh=not journal.sums)
        for pattern in _COPIED_FILES:
            for file in checkpoint.folder.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, partial / file.name)
        tensors = {name: checkpoint.tensors[name] for name in dense}
        if architecture is None:
            head, begins = _safetensors_head(tensors)
            _write_dense(checkpoint, tensors, head, begins, partial / SINGLE_FILE, report)
        else:
            file = partial / DENSE_GGUF
            head, begins = gguf_head(architecture, tensors)
            _write_dense(checkpoint, tensors, head, begins, file, report)
            told = {"version": 1, "files": [file.name], "sizes": [file.stat().st_size]}
            (partial / GGUF_FILE).write_text(json.dumps(told, indent=2) + "\n")
        _write_experts(open_store, layouts, partial / PACKED_FILE, keys, offsets, journal, report)
    for file in partial.iterdir():
        sync_file(file)
    sync_folder(partial)


class _Report:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: ProgressCallback | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress:
            self._progress(self._done, self._total)


def _run_name(checkpoint: Checkpoint, files: list[Path], layouts: list[LayerLayout], settings: str) -> str:
    """Hash the inputs: a partial folder of other inputs must not be continued."""
    stats = {file: file.stat() for file in (*checkpoint.files, *files)}
    found = [(file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()]
    inputs = [__version__, found, checkpoint.tensors, layouts, settings]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _check_space(partial: Path, total: int, *, fresh: bool) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if total - written > free:
        if fresh:
            shutil.rmtree(partial)
        raise ConfigError(
            f"packing needs {total - written:,} more bytes in {partial.parent}, {free:,} are free. Make room."
        )


def _safetensors_head(tensors: dict[str, TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """Return all that comes before the first tensor of a safetensors file, and where each tensor begins."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for name, entry in tensors.items():
        offsets = [position, position + entry.num_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        begins[name], position = position, offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(align_up(len(text), 8))
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def _write_dense(
    checkpoint: Checkpoint,
    tensors: dict[str, TensorEntry],
    head: bytes,
    begins: dict[str, int],
    file: Path,
    report: _Report,
) -> None:
    """Copy tensors, bytes as they are, into one file behind its head."""
    with ExitStack() as stack:
        handles = [stack.enter_context(open(source, "rb")) for source in checkpoint.files]
        target = stack.enter_context(open(file, "wb"))
        target.write(head)
        for name, entry in tensors.items():
            target.write(bytes(begins[name] - target.tell()))
            source, left = handles[entry.file], entry.num_bytes
            source.seek(entry.begin)
            while left:
                chunk = source.read(min(left, _COPY_CHUNK_BYTES))
                if not chunk:
                    raise OSError(errno.EIO, f"{checkpoint.files[entry.file]} ends early")
                target.write(chunk)
                left -= len(chunk)
                report.add(len(chunk))


def _write_experts(
    open_store: Callable[[], ExpertStore],
    layouts: list[LayerLayout],
    file: Path,
    keys: list[ExpertKey],
    offsets: list[list[int]],
    journal: PackJournal,
    report: _Report,
) -> None:
    """Write the records that the journal lacks, in the order of keys, then the header with all checksums."""
    store = open_store()
    threads = ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="moeflow-pack")

    def read(key: ExpertKey) -> np.ndarray:
        record = np.zeros(stride(layouts[key.layer], key.expert), np.uint8)
        store.read(key, record)
        return record

    try:
        with open(file, "r+b" if file.exists() else "w+b") as target:
            target.truncate(offsets[-1][-1] + stride(layouts[-1], keys[-1].expert))
            waiting: deque[tuple[ExpertKey, Future[np.ndarray]]] = deque()

            def write_next() -> None:
                key, future = waiting.popleft()
                record = future.result()
                _write_at(target, offsets[key.layer][key.expert], record.data)
                journal.add(zlib.crc32(record[: layouts[key.layer].record_of(key.expert).num_bytes].data))
                report.add(record.nbytes)

            for key in keys[len(journal.sums) :]:
                waiting.append((key, threads.submit(read, key)))
                if len(waiting) == _READS_IN_FLIGHT:
                    write_next()
            while waiting:
                write_next()
            os.fsync(target.fileno())
            in_order = iter(journal.sums)
            sums_by_layer = [[next(in_order) for _ in range(layout.num_experts)] for layout in layouts]
            _write_at(target, 0, header_bytes(layouts, sums_by_layer))
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        store.close()


def _write_at(target: BinaryIO, offset: int, content: bytes | memoryview) -> None:
    target.seek(offset)
    target.write(content)
    target.flush()
