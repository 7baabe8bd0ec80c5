"""Checks of a packed file: each expert's checksum, and the values of its matrices.

Knows records and their formats. Knows nothing of the model.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from moeflow.checkpoint.lossless_source import with_checks
from moeflow.checkpoint.packed_file import PACKED_FILE, packed_layers
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES, ExpertKey, RecordLayout, align_up
from moeflow.doctor.finding import BROKEN, Finding
from moeflow.doctor.model.shards import AGAIN, NONSENSE
from moeflow.doctor.model.values import Bad, bad_values
from moeflow.dtypes import TORCH_DTYPES, tensors_of
from moeflow.errors import CheckpointError, ExpertReadError
from moeflow.formatting import format_bytes
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format

_THREADS = 4
_DTYPES = {"lossless": "BF16", "ggml": "F32"}  # of kinds of formats that are looked at as values
_PACK = "write it again with moeflow pack"


def packed_bytes(folder: Path) -> int:
    """Return the size of a folder's packed file; 0 where there is none."""
    file = folder / PACKED_FILE
    return file.stat().st_size if file.is_file() else 0


def check_packed(folder: Path, found: list[Finding], progress: Callable[[int], None]) -> None:
    """Read every expert of a packed file.

    Args:
        folder: holds the file.
        found: findings are added to it.
        progress: called with the bytes of each expert that was read; from several threads.
    """
    file = folder / PACKED_FILE
    try:
        layers = with_checks(packed_layers(folder))
        store = ExpertStore([file], layers)
    except CheckpointError as error:
        found.append(Finding("packed file", PACKED_FILE, BROKEN, str(error), _PACK))
        return
    largest = max(source.layout.record.num_bytes for source in layers)
    keys = [ExpertKey(layer, e) for layer, source in enumerate(layers) for e in range(source.layout.num_experts)]
    before, own = len(found), threading.local()

    def look(key: ExpertKey) -> list[Finding]:
        if not hasattr(own, "record"):
            own.record = _record(largest)
        layout = layers[key.layer].layout
        try:
            progress(store.read(key, own.record))
        except ExpertReadError as error:
            return [Finding("packed expert", f"{layout.name}, expert {key.expert}", BROKEN, str(error), _PACK)]
        return [
            Finding(
                "values", f"{PACKED_FILE}: {layout.name}, expert {key.expert}, {name}: {bad}", BROKEN, NONSENSE, AGAIN
            )
            for name, bad in bad_matrices(own.record, layout.record_of(key.expert))
        ]

    with closing(store), ThreadPoolExecutor(_THREADS, "moeflow-doctor") as threads:
        for some in threads.map(look, keys):
            found.extend(some)
    if len(found) == before:
        size = f"{len(keys)} experts of {len(layers)} layers, {format_bytes(packed_bytes(folder))}"
        found.append(Finding("packed file", f"{size}: all checksums agree, neither NaN nor infinity"))


def bad_matrices(raw: np.ndarray, record: RecordLayout) -> Iterator[tuple[str, Bad]]:
    """Yield the tensors of a record that hold NaN or infinity, and how many.

    Args:
        raw: uint8, the record.
        record: its layout.
    """
    formats = {matrix.name: find_format(matrix.format) for matrix in record.matrices}
    for spec in record.tensors:
        owner = formats.get(spec.name)
        if owner is not None and owner.kind in _DTYPES:
            continue  # looked at as values, below
        dtype = spec.dtype
        if owner is not None and owner.kind == "fp8":
            dtype = "F8_E4M3"
        elif spec.name.endswith("_scale") and getattr(formats.get(spec.name[: -len("_scale")]), "kind", "") == "mxfp4":
            dtype = "F8_E8M0"
        yield from _told(spec.name, raw[spec.offset : spec.offset + spec.num_bytes], dtype)
    tensors = tensors_of(torch.from_numpy(raw), record)
    for matrix in record.matrices:
        form = formats[matrix.name]
        if form.kind in _DTYPES:
            values = dequantize(tensors, matrix.name, form, matrix.shape, TORCH_DTYPES[_DTYPES[form.kind]])
            yield from _told(matrix.name, values.contiguous().view(torch.uint8).flatten().numpy(), _DTYPES[form.kind])


def _told(name: str, raw: np.ndarray, dtype: str) -> Iterator[tuple[str, Bad]]:
    nan, infinite = bad_values(raw, dtype)
    if len(nan) or len(infinite):
        yield name, Bad(len(nan), len(infinite))


def _record(num_bytes: int) -> np.ndarray:
    """Return memory at a page, with room up to the next one: a record is read into it without a copy."""
    memory = np.empty(align_up(num_bytes, PAGE_BYTES) + PAGE_BYTES, np.uint8)
    return memory[-memory.ctypes.data % PAGE_BYTES :]
