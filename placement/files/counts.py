"""Count files of moeflow and of other engines: how often tokens chose each expert, read into a `Workload`.

Forms (docs/placement.md): SGLang's records of expert load, fiddler's expert popularity, our own keys in JSON or .npz,
and a bare [L, E] array in .npy, .pt or .csv. Knows nothing of traces.
"""

import csv
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.workload import Workload

SUFFIXES = (".json", ".npz", ".npy", ".pt", ".csv")
_OWN_KEYS = ("load", "transitions", "coactivation", "top_k", "first_layer")
_FOREIGN_KEYS = {"logical_count": "SGLang", "expert_popularity": "fiddler"}  # key -> the engine that writes it
_CSV_HEADER = ["layer_id", "expert_id", "count"]
_ACCEPTED = (
    'Accepted are JSON or .pt with "logical_count" (SGLang) or "expert_popularity" (fiddler), JSON or .npz with "load" '
    'and perhaps "transitions", "coactivation", "top_k" and "first_layer", .csv with layer_id,expert_id,count '
    "(SGLang), and .npy, .pt or .csv with an array [layers, experts]"
)
_MOST_IN_CSV = 4096  # layers, or experts of a layer


def read_counts(path: str | Path) -> Workload:
    """Read a count file. Leading rows without load are dense layers and are left out.

    Args:
        path: .json, .npz, .npy, .pt or .csv.

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
        content = _READERS[kind](path)
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}. Give a count file.") from error
    if isinstance(content, np.ndarray):
        return Workload.of_counts(path.stem, _numbers(path, "the array", content))
    for key in _FOREIGN_KEYS:
        if key in content:
            return Workload.of_counts(path.stem, _summed(path, key, _numbers(path, key, content[key])))
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
    except (ValueError, RecursionError) as error:
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
    except (ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise PlacementError(f"{path} cannot be read as arrays ({error}). {_ACCEPTED}.") from None


def _read_pt(path: Path) -> dict | np.ndarray:
    """Return what torch.save wrote, tensors as arrays; nothing but tensors and plain values is unpickled."""
    try:
        import torch
    except ImportError as error:
        raise PlacementError(f"{path} needs torch, which is not here: pip install torch, or give JSON.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises for a damaged file depends on the byte
        raise PlacementError(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}). {_ACCEPTED}."
        ) from error
    if isinstance(content, torch.Tensor):
        return content.double().numpy()
    if not isinstance(content, dict):
        raise PlacementError(f"{path} holds a {type(content).__name__}, not a tensor or a dict. {_ACCEPTED}.")
    if "records" in content:
        raise PlacementError(
            f"{path} is SGLang's record of each pass. Record the sums: --expert-distribution-recorder-mode stat."
        )
    return {
        str(key): value.double().numpy() if isinstance(value, torch.Tensor) else value for key, value in content.items()
    }


def _read_csv(path: Path) -> np.ndarray:
    """Return SGLang's lines of layer, expert and count as an array, or the rows of a table of numbers."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PlacementError(f"{path} is no text of separated values ({error}). {_ACCEPTED}.") from None
    counted = rows[:1] == [_CSV_HEADER]
    try:
        numbers = [[float(cell) for cell in row] for row in rows[counted:]]
    except ValueError as error:
        raise PlacementError(f"{path}: {error}. {_ACCEPTED}.") from None
    if not numbers or len(set(map(len, numbers))) > 1 or (counted and len(numbers[0]) != len(_CSV_HEADER)):
        raise PlacementError(f"{path} has no rows, or rows of unequal lengths. {_ACCEPTED}.")
    table = np.array(numbers)
    if not counted:
        return table
    places = table[:, :2]
    if not ((places >= 0) & (places < _MOST_IN_CSV) & (places == np.floor(places))).all():
        raise PlacementError(f"{path}: a layer_id or expert_id is no whole number from 0 to {_MOST_IN_CSV - 1}.")
    layers, experts = places.astype(int).T
    counts = np.zeros((layers.max() + 1, experts.max() + 1))
    np.add.at(counts, (layers, experts), table[:, 2])
    return counts


_READERS = {".json": _read_json, ".npz": _read_arrays, ".npy": _read_arrays, ".pt": _read_pt, ".csv": _read_csv}


def _summed(path: Path, key: str, counts: np.ndarray) -> np.ndarray:
    """Return [L, E] of what may be [steps, L, E], as SGLang's recorder writes and its balancer sums it."""
    if counts.ndim != 3:
        return counts
    if not (counts >= 0).all():
        raise PlacementError(f"{path}: {key} has a count that is negative or no number. Count again.")
    return counts.sum(axis=0)


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
