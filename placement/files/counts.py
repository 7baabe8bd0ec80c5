"""Count files of moeflow and of other engines: how often tokens chose each expert, read into a `Workload`.

Four forms (docs/placement.md): SGLang's record of expert load, fiddler's expert popularity, our own keys in JSON or
.npz, and a bare [L, E] array in .npy. Knows nothing of traces.
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.workload import Workload

SUFFIXES = (".json", ".npz", ".npy")
_OWN_KEYS = ("load", "transitions", "coactivation", "top_k", "first_layer")
_FOREIGN_KEYS = {"logical_count": "SGLang", "expert_popularity": "fiddler"}  # key -> the engine that writes it
_ACCEPTED = (
    'Accepted are JSON with "logical_count" (SGLang) or "expert_popularity" (fiddler), JSON or .npz with "load" and '
    'perhaps "transitions", "coactivation", "top_k" and "first_layer", and .npy with an array [layers, experts]'
)


def read_counts(path: str | Path) -> Workload:
    """Read a count file. Leading rows without load are dense layers and are left out.

    Args:
        path: .json, .npz or .npy.

    Raises:
        PlacementError: the file is missing, empty, damaged or of another form, or its counts are no workload's.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise PlacementError(f"{path} is no count file: its name ends in {kind or 'nothing'!r}. {_ACCEPTED}.")
    try:
        if not path.stat().st_size:
            raise PlacementError(f"{path} is empty. {_ACCEPTED}.")
        content = _read_json(path) if kind == ".json" else _read_arrays(path)
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}. Give a count file.") from error
    if isinstance(content, np.ndarray):
        return Workload.of_counts(path.stem, _numbers(path, "the array", content))
    for key in _FOREIGN_KEYS:
        if key in content:
            return Workload.of_counts(path.stem, _numbers(path, key, content[key]))
    return _own_workload(path, content)


def _own_workload(path, content) -> Workload:
    if "load" not in content:
        raise PlacementError(f"{path} has {_listed(content)}. {_ACCEPTED}.")
    unknown = [key for key in content if key not in _OWN_KEYS]
    if unknown:
        raise PlacementError(f"{path} has the unknown key {unknown[0]!r} beside 'load'. {_ACCEPTED}.")
    arrays = {
        key: _numbers(path, key, content[key])
        for key in ("load", "transitions", "coactivation")
        if key == "load" or content.get(key) is not None
    }
    top_k, first_layer = (_whole(path, key, content.get(key)) for key in ("top_k", "first_layer"))
    if top_k is not None and not 1 <= top_k <= arrays["load"].shape[-1]:
        raise PlacementError(
            f"{path}: top_k is {top_k}, and layers have {arrays['load'].shape[-1]} experts. A token takes one to all."
        )
    if first_layer is None:
        return Workload.of_counts(path.stem, top_k=top_k, **arrays)
    return Workload(path.stem, top_k=top_k, first_layer=first_layer, **arrays)


def _read_json(path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise PlacementError(f"{path} is not JSON ({error}). {_ACCEPTED}.") from None
    if not isinstance(content, dict):
        raise PlacementError(f"{path} holds a JSON {type(content).__name__}, not an object. {_ACCEPTED}.")
    return content


def _read_arrays(path) -> dict | np.ndarray:
    """Return an .npy file's array, or an .npz file's arrays by name, without pickled objects."""
    try:
        content = np.load(path)
        if isinstance(content, np.ndarray):
            return content
        with content as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PlacementError(f"{path} cannot be read as arrays ({error}). {_ACCEPTED}.") from None


def _numbers(path, name, values) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise PlacementError(f"{path}: {name} is ragged. Rows must be equally long.") from None
    if array.dtype.kind not in "iuf" or not array.ndim:
        raise PlacementError(f"{path}: {name} is not an array of numbers. Give [layers, experts] counts.")
    return array


def _whole(path, name, value) -> int | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else value
    if type(value) is not int or value < 0:
        raise PlacementError(f"{path}: {name} is {value!r}. Give a whole number, 0 or more.")
    return value


def _listed(content) -> str:
    keys = ", ".join(repr(key) for key in list(content)[:6])
    return f"the keys {keys}" if keys else "no keys"
