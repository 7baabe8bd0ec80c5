"""Checks of a checkpoint's safetensors files: each one's header and size, and each tensor's values, read in pieces.

Knows files and tensors. Knows nothing of what a model does with them.
"""

import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moeflow.checkpoint.headers import INDEX_FILE, SINGLE_FILE, TensorEntry, read_header
from moeflow.checkpoint.weight_index import read_weight_index
from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.doctor.model.values import Bad, bad_values
from moeflow.errors import CheckpointError
from moeflow.formatting import brief, format_bytes
from moeflow.kernels.quantization.ggml import BLOCK_TYPES
from moeflow.kernels.quantization.ggml_values import block_values

NONSENSE = "what is computed from it is NaN, and so is the answer"
AGAIN = "download the file again; if it is so at its source, the model was saved so"
_DOWNLOAD = "download it again: moeflow download continues where files are whole"
_THREADS, _PIECE_BYTES = 4, 1 << 23
_BLOCK_VALUES = 1 << 20  # of GGML's blocks that are looked at together
_LAYER, _EXPERT = re.compile(r"\b(?:layers|h|blocks|blk)\.(\d+)\."), re.compile(r"\bexperts\.(\d+)\.")


class Shards(NamedTuple):
    """The files of a checkpoint whose headers are whole.

    Args:
        files: those files.
        tensors: every tensor in them, by name; its `file` is its place in `files`.
    """

    files: list[Path]
    tensors: dict[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())


def check_shards(folder: Path, found: list[Finding]) -> Shards:
    """Read every shard's header, and compare each with its file and with the index.

    Args:
        folder: of the model.
        found: findings are added to it.

    Returns:
        What can be read.
    """
    names, weight_map = [SINGLE_FILE], {}
    if not (folder / SINGLE_FILE).is_file():
        if not (folder / INDEX_FILE).is_file():
            wrong = f"there is neither {SINGLE_FILE} nor {INDEX_FILE}"
            found.append(Finding("shards", str(folder), BROKEN, wrong, "give the folder of a model in safetensors"))
            return Shards([], {})
        try:
            index = read_weight_index(folder / INDEX_FILE)
        except CheckpointError as error:
            found.append(Finding("index", INDEX_FILE, BROKEN, str(error), _DOWNLOAD))
            names = sorted(file.name for file in folder.glob("*.safetensors"))
        else:
            names, weight_map = index.shards, index.weight_map
    shards, before = Shards([], {}), len(found)
    for name in names:
        try:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing.")
            entries = read_header(folder / name, len(shards.files))
        except CheckpointError as error:
            found.append(Finding("shard", name, BROKEN, str(error), _DOWNLOAD))
            continue
        shards.files.append(folder / name)
        shards.tensors.update(entries)
    read = {file.name for file in shards.files}
    for tensor, shard in weight_map.items():
        entry = shards.tensors.get(tensor)
        if Path(shard).name in read and (entry is None or shards.files[entry.file] != folder / shard):
            wrong = f"the index says that it is in {shard}, and it is not"
            found.append(Finding("index", brief(tensor), BROKEN, wrong, _DOWNLOAD))
    beside = sorted({file.name for file in folder.glob("*.safetensors")} - {Path(name).name for name in names})
    if beside:
        found.append(
            Finding("shards", brief(", ".join(beside)), HARMFUL, "no model reads these files: the index does not name "
                    "them", "remove them, or download the index again")
        )  # fmt: skip
    if len(found) == before:
        size = f"{len(shards.files)} files, {len(shards.tensors)} tensors, {format_bytes(shards.num_bytes)}"
        found.append(Finding("shards", f"{size}: headers and sizes agree"))
    return shards


def check_values(shards: Shards, found: list[Finding], progress: Callable[[int], None]) -> None:
    """Look for NaN and infinity in every tensor.

    Args:
        shards: to be read.
        found: findings are added to it.
        progress: called with the bytes of each piece that was read; from several threads.
    """
    before = len(found)
    with ExitStack() as stack:
        opened = [stack.enter_context(open(file, "rb", buffering=0)).fileno() for file in shards.files]
        own = threading.local()

        def look(item: tuple[str, TensorEntry]) -> list[Finding]:
            name, entry = item
            if not hasattr(own, "piece"):
                own.piece = np.empty(_PIECE_BYTES, np.uint8)
            try:
                return list(
                    _findings(shards.files[entry.file].name, name, entry, _pieces(opened, entry, own.piece, progress))
                )
            except OSError as error:
                why = f"the disk cannot read it: {error.strerror or error}"
                return [
                    Finding("values", f"{shards.files[entry.file].name}: {brief(name)}", BROKEN, why, "check the disk")
                ]

        with ThreadPoolExecutor(_THREADS, "moeflow-doctor") as threads:
            for some in threads.map(look, shards.tensors.items()):
                found.extend(some)
    if len(found) == before and shards.tensors:
        found.append(Finding("values", f"{format_bytes(shards.num_bytes)} of tensors: neither NaN nor infinity"))


def place_of(name: str, expert: int | None = None) -> str:
    """Say where a tensor belongs: its layer and expert, where its name tells.

    Args:
        name: of the tensor.
        expert: of a tensor that holds all experts of a layer.
    """
    layer, of_name = _LAYER.search(name), _EXPERT.search(name)
    number = expert if expert is not None else of_name and int(of_name[1])
    parts = [f"layer {layer[1]}" if layer else "", "" if number is None else f"expert {number}", brief(name)]
    return ", ".join(part for part in parts if part)


def _values(raw: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """Return bytes whose values can be told, with their dtype: those of GGML's blocks in float32."""
    kind = BLOCK_TYPES.get(dtype)
    if kind is None or kind.block_values == 1 or not kind.format:
        return raw, dtype
    values = block_values(torch.from_numpy(raw), kind.format)
    return values.view(torch.uint8).numpy(), "F32"


def _piece_bytes(dtype: str) -> int:
    """Return the bytes that are looked at together: whole values, and whole blocks."""
    kind = BLOCK_TYPES.get(dtype)
    if kind is None or kind.block_values == 1:
        return _PIECE_BYTES
    return _BLOCK_VALUES // kind.block_values * kind.block_bytes


def _pieces(
    opened: list[int], entry: TensorEntry, piece: np.ndarray, progress: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Read a tensor piece by piece into one memory."""
    size = _piece_bytes(entry.dtype)
    for begin in range(0, entry.num_bytes, size):
        raw, done = piece[: min(size, entry.num_bytes - begin)], 0
        while done < len(raw):
            count = os.preadv(opened[entry.file], [raw.data[done:]], entry.begin + begin + done)
            if not count:
                raise OSError("the file ends early")
            done += count
        yield raw
        progress(len(raw))


def _findings(file: str, name: str, entry: TensorEntry, pieces: Iterator[np.ndarray]) -> Iterator[Finding]:
    dtype = "F8_E8M0" if entry.dtype == "U8" and name.endswith("_scales") else entry.dtype  # of gpt-oss
    stacked = ("experts." in name or "_exps." in name) and len(entry.shape) >= 3
    of_each = math.prod(entry.shape[1:]) if stacked else 0
    counts: tuple[Counter[int | None], Counter[int | None]] = Counter(), Counter()
    first = 0
    for raw in pieces:
        for places, count in zip(bad_values(*_values(raw, dtype)), counts, strict=True):
            if len(places):
                count.update(((places + first) // of_each).tolist() if stacked else {None: len(places)})
        first += len(raw) * math.prod(entry.shape) // max(entry.num_bytes, 1)
    for expert in sorted(counts[0].keys() | counts[1].keys(), key=lambda expert: expert or 0):
        bad = Bad(counts[0][expert], counts[1][expert])
        yield Finding("values", f"{file}: {place_of(name, expert)}: {bad}", BROKEN, NONSENSE, AGAIN)
