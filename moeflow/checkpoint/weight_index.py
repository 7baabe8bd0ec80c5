"""The index of a sharded checkpoint: which shard holds which tensor.

Knows the index file. Knows nothing of what is in the shards.
"""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moeflow.errors import CheckpointError
from moeflow.formatting import brief

_MAX_INDEX_BYTES = 100_000_000  # ten times the index of a model of 671B parameters
_MAX_SHARDS = 10_000


class WeightIndex(NamedTuple):
    """A checkpoint's shards.

    Args:
        shards: names of the files, relative to the folder, in order.
        weight_map: {tensor: its shard}.
        dtype: name of the model's torch dtype, where the index gives it.
    """

    shards: list[str]
    weight_map: dict[str, str]
    dtype: str | None


def read_weight_index(file: Path) -> WeightIndex:
    """Read the index, as transformers does.

    Args:
        file: model.safetensors.index.json.

    Raises:
        CheckpointError: it is none, or it names a file outside the folder or one of another kind.
    """
    try:
        size = file.stat().st_size
        text = file.read_bytes() if size <= _MAX_INDEX_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    if size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{file} has {size:,} bytes, an index at most {_MAX_INDEX_BYTES:,}. Download it again.")
    try:
        index = json.loads(text.decode())
        weight_map, metadata = _table(index, "weight_map"), _table(index, "metadata")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors index ({brief(error)}). Download it again.") from None
    if not weight_map:
        raise CheckpointError(f"{file} names no tensor: its weight_map is empty. Download it again.")
    odd = next((shard for shard in weight_map.values() if not isinstance(shard, str)), None)
    if odd is not None or None in weight_map.values():
        raise CheckpointError(f"{file} says {brief(odd)} where the name of a file should be. Download it again.")
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(f"{file} names {len(shards):,} files, at most {_MAX_SHARDS:,} are allowed.")
    for shard in shards:
        _check_shard(file, shard)
    dtype = metadata.get("dtype")
    return WeightIndex(shards, weight_map, dtype if isinstance(dtype, str) else None)


def _table(index: Any, name: str) -> dict[str, Any]:
    found = index.get(name) if isinstance(index, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"it has no table {name!r}, which transformers needs")
    return found


def _check_shard(file: Path, name: str) -> None:
    """Refuse what is not the name of a safetensors file in the index's folder or below it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise CheckpointError(
            f"{file} names the file {brief(name)!r}, which lies outside the folder; only files in the folder and below "
            "it are allowed. Do not use a checkpoint from a source you do not trust."
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} names the file {brief(name)!r}; only safetensors files are allowed. Download it again, or convert "
            "pickled weights once where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)."
        )
    if not name.isprintable() or max(len(os.fsencode(part)) for part in path.parts) > 255:
        raise CheckpointError(
            f"{file} names the file {brief(name)!r}, which no file can be called: the name is too long or has letters "
            "that cannot be printed. Download it again."
        )
