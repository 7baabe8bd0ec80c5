"""Counts the escapes of experts: what each matrix needs in the lossless format. Kept in the cache folder by the files.

The scan reads every expert once. Knows records and counts. Knows nothing of how records are laid out.
"""

import hashlib
import json
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from moeflow.atomic_file import NO_CHECKSUM, is_sealed, seal, write_atomically
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey
from moeflow.dtypes import tensors_of
from moeflow.kernels.cpu.lossless import count_escapes
from moeflow.paths import cache_folder
from moeflow.progress import ProgressCallback

_FORMAT = 2  # of the file, and of the encoder's choice of tops
_READ_THREADS = 4
_log = logging.getLogger(__name__)

Escapes = list[list[list[int]]]
"""[num_layers][num_experts][matrices], how many values of each matrix need an escape."""


def scan_escapes(
    files: list[Path],
    stamps: list[FileStamp],
    sources: list[LayerSource],
    names: list[list[str]],
    *,
    progress: ProgressCallback | None = None,
) -> Escapes:
    """Count the escapes of every expert, or take them from an earlier scan of the same files.

    Args:
        files: that the sources' piece tables number.
        stamps: of the files when their headers were read.
        sources: [num_layers].
        names: [num_layers][matrices], the bfloat16 matrices of each layer's record; empty leaves a layer out.
        progress: called with (bytes looked at, bytes in all).

    Raises:
        CheckpointError: a file cannot be opened, or changed.
        ExpertReadError: the disk failed.
    """
    about = [_FORMAT, [list(stamp) for stamp in stamps], [source.layout for source in sources], names]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    kept = cache_folder() / "lossless" / f"{key[:32]}.json"
    counts = [len(layer_names) for layer_names in names]
    found = _read(kept, [(source.layout.num_experts, count) for source, count in zip(sources, counts, strict=True)])
    if found is None:
        found = _scan(files, stamps, sources, names, progress)
        text = json.dumps({"crc32": NO_CHECKSUM, "escapes": found}, separators=(",", ":"))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, seal(text.encode()), None)
        except OSError as error:
            _log.info("the scan for lossless experts is not kept on disk: %s", error)
    return found


def count_of(source: LayerSource, raw: np.ndarray, names: list[str], expert: int) -> list[int]:
    """Return the escapes of each named matrix of the record in `raw`, uint8 [record.num_bytes]."""
    tensors = tensors_of(torch.from_numpy(raw), source.layout.record_of(expert))
    return [count_escapes(tensors[name]) for name in names]


def _scan(files, stamps, sources, names, progress) -> Escapes:
    found: Escapes = [[[] for _ in range(source.layout.num_experts)] for source in sources]
    keys = [ExpertKey(layer, expert) for layer, kept in enumerate(found) if names[layer] for expert in range(len(kept))]
    total = sum(sources[key.layer].layout.record_of(key.expert).num_bytes for key in keys)
    _log.info("looking at the exponents of %d experts, %d bytes, once a checkpoint", len(keys), total)
    store = ExpertStore(files, sources, stamps=stamps)
    threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="moeflow-scan")

    def look(key: ExpertKey) -> int:
        source = sources[key.layer]
        raw = np.empty(source.layout.record_of(key.expert).num_bytes, np.uint8)
        store.read(key, raw)
        found[key.layer][key.expert] = count_of(source, raw, names[key.layer], key.expert)
        return raw.nbytes

    try:
        waiting: deque[Future[int]] = deque()
        done = 0
        for number, key in enumerate(keys):
            waiting.append(threads.submit(look, key))
            while waiting and (len(waiting) > 2 * _READ_THREADS or number == len(keys) - 1):
                done += waiting.popleft().result()
                if progress is not None:
                    progress(done, total)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        store.close()
    return found


def _read(file: Path, shape: list[tuple[int, int]]) -> Escapes | None:
    """Return the counts of an earlier scan; None where there are none, or the file is damaged."""
    try:
        content = file.read_bytes()
        found = json.loads(content)["escapes"] if is_sealed(content) else []
        sizes = [(len(layer), {len(counts) for counts in layer}) for layer in found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if sizes == [(num_experts, {count}) for num_experts, count in shape] else None
