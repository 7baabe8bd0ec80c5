"""Splits of a GGUF file: their names, and whether they belong together.

Knows names of files and the keys `split.*`. Knows nothing of how a header is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moeflow.errors import CheckpointError

MAX_SPLITS = 10_000
_NAME = re.compile(r"(?s)(.*)-(\d{5})-of-(\d{5})\.gguf")


class Split(NamedTuple):
    """What a split's header says of it.

    Args:
        number: of the split, from 0.
        num_splits: of the model.
        num_tensors: in all splits.
    """

    number: int
    num_splits: int
    num_tensors: int


def find_split(file: Path, metadata: Mapping[str, Any]) -> Split | None:
    """Return which split a file is, None where it is whole.

    Raises:
        CheckpointError: its header's keys contradict each other, or have other values than counts.
    """
    if "split.count" not in metadata:
        return None
    split = Split(*(_count(file, metadata, key) for key in ("split.no", "split.count", "split.tensors.count")))
    if split.num_splits > MAX_SPLITS or split.number >= max(split.num_splits, 1):
        raise CheckpointError(
            f"{file}: its header says that it is split number {split.number} (from 0) of {split.num_splits:,}, which "
            f"cannot be; at most {MAX_SPLITS:,} are allowed. Download it again, and from a source that you trust."
        )
    return split if split.num_splits > 1 else None


def _count(file: Path, metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{file}: key {key!r} of a split must be a count, and it "
            f"{'is missing' if key not in metadata else 'has another value'}. Download it again."
        )
    return value


def split_files(file: Path, split: Split) -> list[Path]:
    """Return the paths of all splits, in order.

    Args:
        file: one of them.
        split: which one, by its header.

    Raises:
        CheckpointError: the file was given another name, or a split is missing.
    """
    match = _NAME.fullmatch(file.name)
    if match is None or (int(match[2]) - 1, int(match[3])) != split[:2]:
        ending = f"-{split.number + 1:05d}-of-{split.num_splits:05d}.gguf"
        raise CheckpointError(
            f"{file} is split {split.number + 1} of {split.num_splits} by its header, and its name does not end in "
            f"{ending}. Give the splits their names back, so that the others are found."
        )
    files = [file.with_name(f"{match[1]}-{number + 1:05d}-of-{match[3]}.gguf") for number in range(split.num_splits)]
    missing = [found for found in files if not found.is_file()]
    if missing:
        raise CheckpointError(
            f"{file}: {len(missing)} of {split.num_splits} splits are missing beside it, the first is "
            f"{missing[0].name}. Download them into the same folder."
        )
    return files


def check_belongs(file: Path, metadata: Mapping[str, Any], number: int, given: Path, split: Split) -> None:
    """Refuse a split of another model.

    Args:
        file: the split.
        metadata: its own.
        number: which split it is by its name, from 0.
        given: the split that was opened first.
        split: what that one's header says.

    Raises:
        CheckpointError: the headers of the two contradict each other.
    """
    found = find_split(file, metadata)
    if found != split._replace(number=number):
        raise CheckpointError(
            f"{file} is {_described(found)} by its header, and {given.name} asks for "
            f"{_described(split._replace(number=number))}. They do not belong together: download the splits of one "
            "model again."
        )


def _described(split: Split | None) -> str:
    if split is None:
        return "a whole file"
    return f"split {split.number + 1} of {split.num_splits} of a model of {split.num_tensors:,} tensors"
