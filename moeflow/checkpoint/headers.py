"""Headers of a safetensors checkpoint: file, offset and length of each tensor.

Knows headers and sizes of files. Knows nothing of models, experts or torch. Format:
https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON header, then the tensors'
bytes).
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from moeflow.checkpoint.reading.file_stamp import FileStamp, check_unchanged
from moeflow.checkpoint.weight_index import WeightIndex, read_weight_index
from moeflow.core import DTYPE_BYTES
from moeflow.errors import CheckpointError, ModelSourceError
from moeflow.formatting import brief

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
SMALL_HEADER_BYTES = 4_000_000  # larger ones must be smaller than the tensors that they describe
MAX_TENSORS = 200_000  # in one file; a quantised model of 235B parameters has 150,000 in all its files
DTYPES_OF_MODELS = ("F64", "F32", "BF16", "F16")
_DTYPE_BITS = {name: 8 * size for name, size in DTYPE_BYTES.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8
}  # fmt: skip
_MOST = 1 << 63


class TensorEntry(NamedTuple):
    """Place of one tensor: file number, dtype, shape, absolute byte offset and length."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class Checkpoint(NamedTuple):
    """A checkpoint's headers.

    Args:
        folder: it lies there.
        files: its shards.
        tensors: every tensor by its name in the checkpoint.
        stamps: [len(files)], of the shards before their headers were read.
        dtype: that a model has whose config.json names none, as transformers decides it: a torch dtype's name that the
            index gives, or the safetensors name of the first shard's first float tensor. None where there is neither.
    """

    folder: Path
    files: list[Path]
    tensors: dict[str, TensorEntry]
    stamps: list[FileStamp]
    dtype: str | None

    def check_unchanged(self) -> None:
        """Refuse files that changed since their headers were read.

        Raises:
            CheckpointError: one is another file now, was written to, or is gone; the message names it.
        """
        check_unchanged(self.files, self.stamps)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder and check them against the files' sizes.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        ModelSourceError: the folder is not there.
        CheckpointError: no safetensors weights, a shard is missing, truncated or corrupt, the index names a
            file outside the folder or a tensor that is not in its shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelSourceError(f"{folder} is not a folder. Give a folder with a checkpoint, or a hub id.")
    single, index_file = folder / SINGLE_FILE, folder / INDEX_FILE
    index = WeightIndex([SINGLE_FILE], {}, None)
    if single.is_file():
        _refuse_empty(single, index_file)
    elif index_file.is_file():
        index = read_weight_index(index_file)
    else:
        raise _no_weights(folder)
    files = [folder / name for name in index.shards]
    try:
        missing = [file for file in files if not file.is_file()]
        stamps = [] if missing else [FileStamp.of(file) for file in files]
    except OSError as error:
        raise CheckpointError(f"{brief(error.filename)} cannot be read: {error.strerror}.") from None
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, the first is "
            f"{brief(missing[0].relative_to(folder))}. Download the checkpoint again."
        )
    return joined_headers(folder, index, (read_header(file, number) for number, file in enumerate(files)), stamps)


def joined_headers(
    folder: Path, index: WeightIndex, headers: Iterable[dict[str, TensorEntry]], stamps: list[FileStamp]
) -> Checkpoint:
    """Join the headers of a checkpoint's shards.

    Args:
        folder: of the checkpoint.
        index: its shards and what they hold.
        headers: [len(index.shards)], one after another.
        stamps: [len(index.shards)], of the shards before; empty where they are not on this machine.

    Raises:
        CheckpointError: the index names a tensor that is not there.
    """
    tensors: dict[str, TensorEntry] = {}
    dtype = index.dtype
    for number, found in enumerate(headers):
        if number == 0 and dtype is None:
            dtype = next((found[name].dtype for name in sorted(found) if found[name].dtype in DTYPES_OF_MODELS), None)
        tensors.update(found)
    for name, shard in index.weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: tensor {brief(name)!r} is not in {shard}, where the index says it is. The "
                "index and the shards do not belong together: download the checkpoint again."
            )
    return Checkpoint(folder, [folder / name for name in index.shards], tensors, stamps, dtype)


def _refuse_empty(single: Path, index_file: Path) -> None:
    """Refuse an empty file that hides the shards: transformers, too, takes the single file first."""
    if single.stat().st_size == 0 and index_file.is_file():
        raise CheckpointError(
            f"{single} is empty, and it comes before the shards of {index_file.name} beside it. Remove the empty file."
        )


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(file.name for file in folder.glob("*.bin")) or sorted(file.name for file in folder.glob("*.pt*"))
    if pickled:
        return CheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}). moeflow never unpickles, since that runs code from the "
            "file. Convert it once where you trust it: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), which writes safetensors."
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Give a folder with safetensors weights."
    )


def read_header(file: Path, number: int = 0) -> dict[str, TensorEntry]:
    """Read one safetensors header and check it as safetensors' own library does.

    Args:
        file: the shard.
        number: the file's place in `Checkpoint.files`, copied into every entry.

    Raises:
        CheckpointError: the header is not one, or the file does not hold what its header says.
    """
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            text = handle.read(header_length(file, handle.read(8), size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return header_entries(file, text, size, number)


def header_length(file: Path, first: bytes, size: int) -> int:
    """Return how long a shard's header is.

    Args:
        file: the shard, for the error.
        first: the shard's first 8 bytes.
        size: of the shard, in bytes.

    Raises:
        CheckpointError: such a header cannot be.
    """
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file: {size} bytes in all, and a header of {length} bytes "
            "announced. Download it again."
        )
    data = size - 8 - length
    if length > max(SMALL_HEADER_BYTES, data):
        raise CheckpointError(
            f"{file} has a header of {length:,} bytes for {data:,} bytes of tensors, which cannot be right. "
            "Download it again, and from a source that you trust."
        )
    return length


def header_entries(file: Path, text: bytes, size: int, number: int = 0) -> dict[str, TensorEntry]:
    """Read the text of a header and check it as safetensors' own library does.

    Args:
        file: the shard, for the error.
        text: the header, without the 8 bytes before it.
        size: of the shard, in bytes.
        number: the file's place in `Checkpoint.files`, copied into every entry.

    Raises:
        CheckpointError: the header is not one, or the file does not hold what its header says.
    """
    length, num_tensors = len(text), text.count(b"data_offsets")
    if num_tensors > MAX_TENSORS:
        raise CheckpointError(
            f"{file} has {num_tensors:,} tensors in its header, and at most {MAX_TENSORS:,} in one file are "
            "allowed. Save the model in smaller shards: save_pretrained(folder, max_shard_size=...)."
        )
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        _check_metadata(header.pop("__metadata__", None))
        "".join(header).encode()  # no half of a surrogate pair
        entries = {name: _entry(info, number, 8 + length) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a corrupt header ({brief(f'{type(error).__name__}: {error}')}). Download it again."
        ) from None
    _check_places(file, entries, 8 + length, size)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a table of texts")


def _entry(info: dict[str, Any], number: int, data: int) -> TensorEntry:
    """Return a tensor's place from what the header says of it; `data` is where the tensors' bytes begin."""
    dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(shape, list):
        raise ValueError(f"{shape!r} is not a shape")
    for value in (begin, end, *shape):
        if type(value) is not int or not 0 <= value < _MOST:
            raise ValueError(f"{value!r} is not a size or an offset")
    if dtype not in _DTYPE_BITS:
        raise ValueError(f"dtype {dtype!r} is unknown")
    return TensorEntry(number, dtype, tuple(shape), data + begin, end - begin)


def _check_places(file: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    """Refuse tensors whose bytes are not as many as their shapes need, or that do not follow one another."""
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        fits = 8 * entry.num_bytes == math.prod(entry.shape) * _DTYPE_BITS[entry.dtype]
        if not fits or entry.begin != position:
            begin, end = entry.begin - data, entry.begin - data + entry.num_bytes
            why = f"and the tensors before it end at {position - data}: no gap or overlap is allowed"
            raise CheckpointError(
                f"{file}: tensor {brief(name)!r} of {entry.dtype} {brief(list(entry.shape))} has bytes {begin} to "
                f"{end}, {why if fits else 'which cannot be'}. The header is corrupt: download it again."
            )
        position += entry.num_bytes
    if position > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes in all, {position} according to its header. Download it again."
        )
    if position < size:
        raise CheckpointError(
            f"{file} has {size - position} bytes behind its header's last tensor. It is damaged: download it again."
        )
