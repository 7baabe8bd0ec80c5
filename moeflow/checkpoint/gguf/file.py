"""A GGUF file of one or many splits: its metadata, and the place of each tensor.

Knows headers and sizes of files. Knows nothing of models or torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moeflow.checkpoint.gguf.header import MAX_TENSORS, GgufHeader, read_header
from moeflow.checkpoint.gguf.splits import Split, check_belongs, find_split, split_files
from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.errors import CheckpointError
from moeflow.formatting import brief

GGUF_FILE = "gguf.json"  # in a folder that stands for a GGUF file: {"version", "files", "sizes"}
ARCHITECTURE_KEY = "general.architecture"


class GgufFile(NamedTuple):
    """The headers of a GGUF file.

    Args:
        files: its splits, in order; one where it is whole.
        stamps: [len(files)], of the splits before their headers were read.
        metadata: of the first split: int, float, bool, str, or lists of these. A value is decoded whenever it is asked
            for.
        tensors: of all splits, by their names in the file. `dtype` is GGML's name of the type in capitals, such as
            "Q4_K"; `shape` is in torch's order, the reverse of the file's.
    """

    files: list[Path]
    stamps: list[FileStamp]
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorEntry]


def open_gguf(path: Path) -> GgufFile:
    """Read the headers of a GGUF file and check them against the files' sizes. Never reads a tensor.

    Args:
        path: of the file, or of any of its splits.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or no GGUF file, or a split is of another model; the
            message names the file, and the key or tensor.
    """
    path = Path(path)
    stamp = _stamp(path)
    header = read_header(path)
    split = find_split(path, header.metadata)
    if split is None:
        _check_architecture(path, header.metadata)
        return GgufFile([path], [stamp], header.metadata, header.tensors)
    return _joined(path, stamp, header, split)


def _joined(path: Path, stamp: FileStamp, header: GgufHeader, split: Split) -> GgufFile:
    """Join the splits that belong to one of them. Holds the metadata of two at most."""
    files = split_files(path, split)
    stamps = [_stamp(file) for file in files]
    stamps[split.number] = stamp
    first, tensors = header.metadata, dict[str, TensorEntry]()
    for number, file in enumerate(files):
        metadata, found = header if number == split.number else read_header(file)
        check_belongs(file, metadata, number, path, split)
        if number == 0:
            _check_architecture(file, metadata)
            first = metadata
        _check_same_architecture(file, metadata, files[0], first)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"{file}: tensor {twice!r} is in {files[tensors[twice].file].name} too. The splits do not belong "
                "together: download the splits of one model again."
            )
        tensors.update((name, entry._replace(file=number)) for name, entry in found.items())
        _check_total(file, len(tensors), split)
    if len(tensors) != split.num_tensors:
        raise CheckpointError(
            f"{path}: its {split.num_splits} splits have {len(tensors):,} tensors, and {split.num_tensors:,} by their "
            "headers. They do not belong together: download the splits of one model again."
        )
    return GgufFile(files, stamps, first, tensors)


def _check_total(file: Path, num_tensors: int, split: Split) -> None:
    """Refuse too many tensors before more headers are read."""
    if num_tensors > min(split.num_tensors, MAX_TENSORS):
        raise CheckpointError(
            f"{file}: the splits up to this one have {num_tensors:,} tensors, all of them {split.num_tensors:,} by "
            f"their headers, and at most {MAX_TENSORS:,} are allowed. Download the splits of one model again."
        )


def _check_architecture(file: Path, metadata: Mapping[str, Any]) -> None:
    found = metadata.get(ARCHITECTURE_KEY)
    if not isinstance(found, str) or not found:
        raise CheckpointError(
            f"{file} has no text under the key {ARCHITECTURE_KEY!r}, which every model has. It is damaged or no model: "
            "download it again."
        )


def _check_same_architecture(file: Path, metadata: Mapping[str, Any], other: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a split of another architecture; most splits but the first name none."""
    found = metadata.get(ARCHITECTURE_KEY, expected[ARCHITECTURE_KEY])
    if found != expected[ARCHITECTURE_KEY]:
        raise CheckpointError(
            f"{file} is of the architecture {brief(found)!r}, {other.name} of {brief(expected[ARCHITECTURE_KEY])!r}. "
            "They do not belong together: download the splits of one model again."
        )


def _stamp(file: Path) -> FileStamp:
    try:
        return FileStamp.of(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {getattr(error, 'strerror', error)}.") from None
