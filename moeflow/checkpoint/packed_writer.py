"""Writes a packed model folder: the dense weights as they are, and one aligned, checksummed record an expert.

The writer fills `OUT.partial` and renames it when it is whole. After a kill the next run continues at the first expert
that is not in the journal.

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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from moeflow.checkpoint.headers import SINGLE_FILE, Checkpoint
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.packed_file import PACKED_FILE, header_bytes, record_offsets, stride
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, LayerLayout, align_up
from moeflow.errors import ConfigError, MoeflowError
from moeflow.progress import ProgressCallback

logger = logging.getLogger(__name__)

_JOURNAL = "experts.journal"
_COPIED_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_READS_IN_FLIGHT = 4
_COPY_CHUNK_BYTES = 16 << 20


def check_output(folder: Path, out: Path) -> None:
    """Refuse a folder that cannot be packed, before anything is read.

    Raises:
        ConfigError: `out` exists, or `folder` is packed already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Give a folder that does not, or remove it.")
    if (folder / PACKED_FILE).exists():
        raise ConfigError(f"{folder} is packed already.")


def write_packed(
    checkpoint: Checkpoint,
    layers: list[LayerSource],
    feeding: set[str],
    out: Path,
    *,
    settings: str = "",
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a folder of records and of all tensors that feed no expert.

    Args:
        checkpoint: to copy from.
        layers: [num_layers], the sources of records.
        feeding: names of the tensors that feed experts.
        out: the folder to write.
        settings: everything else that decides the records' bytes; a partial folder of other settings is not continued.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: `out` exists, or its disk is too small.
        MoeflowError: the disk became full or failed; `out` is not there, `OUT.partial` continues on the next run.
    """
    folder = checkpoint.folder
    dense = [name for name in checkpoint.tensors if name not in feeding]
    layouts = [source.layout for source in layers]
    partial = out.with_name(out.name + ".partial")
    identity = _identity(checkpoint, layouts, settings)
    done = _resume(partial, identity)

    _, experts_end = record_offsets(layouts, len(header_bytes(layouts)))
    dense_bytes = sum(checkpoint.tensors[name].num_bytes for name in dense)
    total = dense_bytes + experts_end
    _check_space(partial, total, fresh=not done)
    report = _Report(progress, total)
    try:
        for pattern in _COPIED_FILES:
            for file in folder.glob(pattern):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, partial / file.name)
        _write_dense(checkpoint, dense, partial / SINGLE_FILE, report)
        _write_experts(checkpoint, layers, partial, done, report)
        (partial / _JOURNAL).unlink()
        os.rename(partial, out)
    except OSError as error:
        raise MoeflowError(
            f"{out} could not be written: {error.strerror or error}. What is done is kept in "
            f"{partial}: make room and run the same command again, or remove that folder."
        ) from error
    return out


class _Report:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: ProgressCallback | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress:
            self._progress(self._done, self._total)


def _identity(checkpoint: Checkpoint, layouts: list[LayerLayout], settings: str) -> str:
    """Hash the inputs: a partial folder of other inputs must not be continued."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return hashlib.sha256(json.dumps([files, layouts, settings]).encode()).hexdigest()


def _resume(partial: Path, identity: str) -> list[int]:
    """Return the checksums of the records that are written already, in file order."""
    journal = partial / _JOURNAL
    if journal.is_file():
        lines = journal.read_text().split("\n")
        if lines[0] == identity:
            done = [int(line, 16) for line in lines[1:-1]]  # the last line is empty, or was cut off by a kill
            journal.write_text("\n".join([identity, *(f"{value:08x}" for value in done), ""]))
            logger.info("continuing %s after %d experts", partial, len(done))
            return done
    elif partial.exists() and any(partial.iterdir()):
        raise ConfigError(
            f"{partial} holds something that moeflow pack did not write. Remove it or choose another folder."
        )
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    journal.write_text(identity + "\n")
    return []


def _check_space(partial: Path, total: int, *, fresh: bool) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if total - written > free:
        if fresh:
            shutil.rmtree(partial)
        raise ConfigError(
            f"packing needs {total - written:,} more bytes in {partial.parent}, {free:,} are free. Make room."
        )


def _write_dense(checkpoint: Checkpoint, names: list[str], file: Path, report: _Report) -> None:
    """Copy tensors, bytes as they are, into one safetensors file."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        entry = checkpoint.tensors[name]
        offsets = [position, position + entry.num_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(align_up(len(text), 8))
    with ExitStack() as stack:
        handles = [stack.enter_context(open(source, "rb")) for source in checkpoint.files]
        target = stack.enter_context(open(file, "wb"))
        target.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            entry = checkpoint.tensors[name]
            source, left = handles[entry.file], entry.num_bytes
            source.seek(entry.begin)
            while left:
                chunk = source.read(min(left, _COPY_CHUNK_BYTES))
                if not chunk:
                    raise OSError(errno.EIO, f"{checkpoint.files[entry.file]} ends early")
                target.write(chunk)
                left -= len(chunk)
                report.add(len(chunk))
        target.flush()
        os.fsync(target.fileno())


def _write_experts(
    checkpoint: Checkpoint, layers: list[LayerSource], partial: Path, done: list[int], report: _Report
) -> None:
    layouts = [source.layout for source in layers]
    offsets, end = record_offsets(layouts, len(header_bytes(layouts)))
    keys = [ExpertKey(number, expert) for number, layout in enumerate(layouts) for expert in range(layout.num_experts)]
    sums = list(done)
    report.add(sum(stride(layouts[key.layer], key.expert) for key in keys[: len(done)]))
    file, store = partial / PACKED_FILE, ExpertStore(checkpoint.files, layers, stamps=checkpoint.stamps)
    threads = ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="moeflow-pack")
    try:
        with open(file, "r+b" if file.exists() else "w+b") as target, open(partial / _JOURNAL, "a") as journal:
            target.truncate(end)

            def read(key: ExpertKey) -> np.ndarray:
                record = np.zeros(stride(layouts[key.layer], key.expert), np.uint8)
                store.read(key, record)
                return record

            waiting: deque[tuple[ExpertKey, Future[np.ndarray]]] = deque()
            for key in keys[len(done) :]:
                waiting.append((key, threads.submit(read, key)))
                if len(waiting) < _READS_IN_FLIGHT:
                    continue
                sums.append(_write_record(target, journal, layouts, offsets, report, *waiting.popleft()))
            while waiting:
                sums.append(_write_record(target, journal, layouts, offsets, report, *waiting.popleft()))
            os.fsync(target.fileno())
            in_order = iter(sums)
            sums_by_layer = [[next(in_order) for _ in range(layout.num_experts)] for layout in layouts]
            target.seek(0)
            target.write(header_bytes(layouts, sums_by_layer))
            target.flush()
            os.fsync(target.fileno())
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        store.close()


def _write_record(
    target: BinaryIO,
    journal: TextIO,
    layouts: list[LayerLayout],
    offsets: list[list[int]],
    report: _Report,
    key: ExpertKey,
    future: Future[np.ndarray],
) -> int:
    record = future.result()
    target.seek(offsets[key.layer][key.expert])
    target.write(record.data)
    target.flush()
    value = zlib.crc32(record[: layouts[key.layer].record_of(key.expert).num_bytes].data)
    journal.write(f"{value:08x}\n")  # after the record: what the journal names is in the file
    journal.flush()
    report.add(record.nbytes)
    return value
