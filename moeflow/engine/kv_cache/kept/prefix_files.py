"""Files of a prefix tree: what was kept lives through a restart, tied to its model and checked.

Knows trees and their slots. Knows nothing of budgets or of how a model's fingerprint is made.

A folder holds one folder a model, by its fingerprint: a sealed index of the runs, and a safetensors file of each run.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from moeflow.atomic_file import NO_CHECKSUM, atomic_file, cannot_write, is_sealed, seal, write_atomically
from moeflow.engine.kv_cache.kept import run_tensors
from moeflow.engine.kv_cache.kept.kept_runs import Run
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.room import Room
from moeflow.errors import MoeflowError

_log = logging.getLogger(__name__)
_FORMAT = "moeflow kept prefixes, version 2"
_INDEX = "index.json"
_SUFFIX = ".kept"


def save(tree: PrefixTree, folder: Path, fingerprint: str) -> int:
    """Write what a tree keeps, and remove what it kept at an earlier time; runs that are there are not written again.

    Args:
        tree: whose runs these are.
        folder: made where it is not there; the model's folder in it is its owner's alone.
        fingerprint: of the model, usable as a folder's name.

    Returns:
        The number of tokens that are kept.

    Raises:
        MoeflowError: the folder cannot be made, or a file not written.
    """
    own = folder / fingerprint
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)  # it tells what was talked about
    except OSError as error:
        raise MoeflowError(cannot_write(own, error)) from error
    known = {row["file"]: row["crc32"] for row in _read_index(own, fingerprint, quiet=True)}
    rows: list[dict[str, Any]] = []
    for run in tree.runs():
        parts = sorted((part.begin, part.end) for part in run.parts)
        name = hashlib.sha256(repr((run.scaling, run.before, run.tokens, parts)).encode()).hexdigest()[:32] + _SUFFIX
        if name not in known or not (own / name).exists():
            tensors = run_tensors.named(run)
            with atomic_file(own / name) as partial:
                safetensors.torch.save_file(tensors, partial)
            known[name] = _checksum(tensors)
        rows.append(
            {
                "file": name,
                "crc32": known[name],
                "scaling": run.scaling,
                "before": run.before,
                "tokens": run.tokens,
                "parts": parts,
            }
        )
    index = {"format": _FORMAT, "model": fingerprint, "crc32": NO_CHECKSUM, "runs": rows}
    write_atomically(own / _INDEX, seal(json.dumps(index).encode()))
    listed = {row["file"] for row in rows}
    for file in own.glob(f"*{_SUFFIX}"):
        if file.name not in listed:
            with suppress(OSError):
                file.unlink()
    return tree.num_tokens


def load(
    folder: Path, fingerprint: str, layout: dict[int, LayerShape], has_room: Callable[[int, int], bool]
) -> Iterator[Run]:
    """Yield the runs that were saved of a model, most recently used first; what is damaged is left out with a warning.

    Args:
        folder: as in `save`; nothing is yielded where it is not there.
        fingerprint: of the model.
        layout: the layers that keep keys and values, by their number.
        has_room: asked before each run is read whether there is room for its bytes and its number of tokens.
    """
    own = folder / fingerprint
    plain, windowed = (
        sum(shape.position_bytes for shape in layout.values() if bool(shape.window) is of_window)
        for of_window in (False, True)
    )
    for row in _read_index(own, fingerprint):
        num_bytes = plain * len(row["tokens"]) + windowed * sum(end - begin for begin, end in row["parts"])
        if not has_room(num_bytes, len(row["tokens"])):
            continue
        run = _read_run(own / row["file"], row, layout)
        if run is not None:
            yield run


def load_into(tree: PrefixTree, room: Room, folder: Path, fingerprint: str, layout: dict[int, LayerShape]) -> int:
    """Let a tree have what was saved of a model, as far as there is room; return the number of tokens."""
    before = tree.num_tokens
    for run in load(folder, fingerprint, layout, room.can_hold):
        tree.restore(run)
        del run
        room.settle()
    room.settle()
    return tree.num_tokens - before


def _read_index(own: Path, fingerprint: str, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a folder's index; none where there is none, or it is damaged or another model's."""
    try:
        content = (own / _INDEX).read_bytes()
    except OSError:
        return []
    if is_sealed(content):
        index = json.loads(content)
        if (index["format"], index["model"]) == (_FORMAT, fingerprint):
            return index["runs"]
    if not quiet:
        _log.warning("%s is damaged or of another model: what was kept there is not used.", own / _INDEX)
    return []


def _read_run(file: Path, row: dict[str, Any], layout: dict[int, LayerShape]) -> Run | None:
    """Return the run of a row; None, with a warning, where the file is not the one that was saved."""
    scaling = None if row["scaling"] is None else tuple(row["scaling"])
    parts = [(begin, end) for begin, end in row["parts"]]
    wanted = run_tensors.wanted(len(row["tokens"]), parts, layout)
    try:
        tensors = safetensors.torch.load_file(file)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if _checksum(tensors) == row["crc32"] and found == {name: one[:2] for name, one in wanted.items()}:
            kept = run_tensors.kept_of(tensors, len(row["tokens"]), parts, layout)
            return Run(scaling, row["before"], row["tokens"], *kept)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        _log.warning("%s cannot be read (%s): this kept prefix is not used.", file, error)
        return None
    _log.warning("%s is damaged or of another model: this kept prefix is not used.", file)
    return None


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """Return the CRC-32 of all tensors' bytes, in the order of their names."""
    crc32 = 0
    for _, tensor in sorted(tensors.items()):
        crc32 = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy().data, crc32)
    return crc32
