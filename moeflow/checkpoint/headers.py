"""Headers of a safetensors checkpoint: file, offset and length of each tensor.

Knows headers and sizes of files. Knows nothing of models, experts or torch. Format:
https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON header, then the tensors'
bytes).
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from moeflow.checkpoint.file_stamp import FileStamp, check_stamps
from moeflow.core import DTYPE_BYTES
from moeflow.errors import CheckpointError, ModelSourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class TensorEntry(NamedTuple):
    """Place of one tensor: file number, dtype, shape, absolute byte offset and length."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class Checkpoint(NamedTuple):
    """The files of a checkpoint and every tensor in them by its name in the checkpoint."""

    folder: Path
    files: list[Path]
    tensors: dict[str, TensorEntry]
    stamps: list[FileStamp]

    def check_unchanged(self) -> None:
        """Refuse files that changed since their headers were read.

        Raises:
            CheckpointError: one is another file now, was written to, or is gone; the message names it.
        """
        try:
            check_stamps(self.files, self.stamps, [FileStamp.of(file) for file in self.files])
        except OSError as error:
            raise CheckpointError(f"{error.filename} is gone since its header was read. Run it again.") from None


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
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        weight_map: dict[str, str] = {}
        names = [SINGLE_FILE]
    elif index.is_file():
        weight_map = _read_weight_map(index)
        names = sorted(set(weight_map.values()))
    else:
        raise _no_weights(folder)
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}. "
            "Download the checkpoint again."
        )
    stamps = [FileStamp.of(file) for file in files]
    tensors: dict[str, TensorEntry] = {}
    for number, file in enumerate(files):
        tensors.update(read_header(file, number))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: tensor {name!r} is not in {shard}, where the index says it is. The index and the shards "
                "do not belong together: download the checkpoint again."
            )
    return Checkpoint(folder, files, tensors, stamps)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error}). Download it again.") from None
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or name in (".", "..") or "\\" in name:
            raise CheckpointError(
                f"{index} names the file {name!r}, which lies outside the folder; only plain file names are allowed. "
                "Do not use a checkpoint from a source you do not trust."
            )
    return weight_map


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
    """Read one safetensors header.

    Args:
        file: the shard.
        number: the file's place in `Checkpoint.files`, copied into every entry.

    Raises:
        CheckpointError: the header is not one, or the file is shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file: {size} bytes on disk, and a header of {length} "
                    "bytes announced. Download it again."
                )
            header = json.loads(handle.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} has a corrupt header ({error}). Download it again.") from None
    data = 8 + length
    entries, end_of_data = {}, data
    try:
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            num_bytes = math.prod(shape) * DTYPE_BYTES.get(info["dtype"], 0)
            if begin < 0 or end < begin or (num_bytes and end - begin != num_bytes):
                raise CheckpointError(
                    f"{file}: tensor {name!r} of {info['dtype']} {list(shape)} has bytes {begin} to {end}, which "
                    "cannot be. The header is corrupt: download it again."
                )
            entries[name] = TensorEntry(number, info["dtype"], shape, data + begin, end - begin)
            end_of_data = max(end_of_data, data + end)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} has a corrupt header ({error!r}). Download it again.") from None
    if end_of_data > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes on disk, {end_of_data} according to its header. Download it again."
        )
    return entries
