"""Topology files: the machine a plan is for, in JSON or TOML, in the units on a data sheet (docs/placement.md)."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from moeflow.errors import ConfigError, PlacementError
from moeflow.memory_size import parse_memory
from moeflow.placement.topology import PRESETS, Gpu, Topology, preset

_TOP_KEYS = ("name", "gpus", "links", "bandwidth_gb_per_s")
_GPU_KEYS = ("name", "count", "memory", "tflops", "memory_gb_per_s", "node")
_COUNT_DEFAULTS = (("count", 1), ("node", 0))  # keys and their default values
_LINK_KEYS = ("within_node_gb_per_s", "between_nodes_gb_per_s")


def load_topology(name_or_path: str | Path, num_gpus: int | None = None) -> Topology:
    """Return a preset, which needs the number of GPUs, or a file's topology.

    Raises:
        PlacementError: neither a preset nor a file, a file of another number of GPUs, or a malformed file.
    """
    if str(name_or_path) in PRESETS:
        if num_gpus is None:
            raise PlacementError(f"topology {name_or_path} is of any size: say how many GPUs there are (--gpus).")
        return preset(str(name_or_path), num_gpus)
    if not Path(name_or_path).exists():
        raise PlacementError(
            f"topology {str(name_or_path)!r} is neither a file nor known. Known: {', '.join(PRESETS)}."
        )
    topology = read_topology(name_or_path)
    if num_gpus not in (None, topology.num_gpus):
        raise PlacementError(
            f"{name_or_path} describes {topology.num_gpus} GPUs, and {num_gpus} were asked for. Correct one of the two."
        )
    return topology


def read_topology(path: str | Path) -> Topology:
    """Read a topology file, .json or .toml.

    Raises:
        PlacementError: the file is missing or malformed, a key is unknown or absent, or the machine is invalid.
    """
    path = Path(path)
    content = _read(path)
    _check_keys(path, content, "the file", _TOP_KEYS, ("gpus",))
    gpus = _gpus(path, content["gpus"])
    if "links" in content and "bandwidth_gb_per_s" in content:
        raise PlacementError(f"{path} has both links and bandwidth_gb_per_s. Give one of the two.")
    if "bandwidth_gb_per_s" in content:
        bandwidth = _matrix(path, content["bandwidth_gb_per_s"])
    else:
        bandwidth = _of_links(path, content.get("links", {}), [gpu.node for gpu in gpus])
    name = content.get("name", path.stem)
    if not isinstance(name, str):
        raise PlacementError(f"{path}: name is {name!r}. Give text.")
    return Topology(name, tuple(gpus), bandwidth)


def _read(path) -> dict:
    kind = path.suffix.lower()
    if kind not in (".json", ".toml"):
        raise PlacementError(f"{path} is no topology file. Allowed: a name that ends in .json or .toml.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if kind == ".json" else _toml().loads(text)
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}. Give a topology file.") from error
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{path} is not {kind[1:].upper()}: {error}.") from None
    return content


def _toml() -> ModuleType:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover - Python 3.10
        import tomli as tomllib
    return tomllib


def _gpus(path, entries) -> list[Gpu]:
    if not isinstance(entries, list) or not entries:
        raise PlacementError(f"{path}: gpus is {_short(entries)}. Give a list with an entry for each kind of GPU.")
    gpus = []
    for number, entry in enumerate(entries):
        where = f"gpus[{number}]"
        _check_keys(path, entry, where, _GPU_KEYS, ("memory", "tflops", "memory_gb_per_s"))
        if isinstance(entry.get("name"), str):
            where += f" ({entry['name']})"
        count, node = (_whole(path, f"{where}: {key}", entry.get(key, usual)) for key, usual in _COUNT_DEFAULTS)
        if not count:
            raise PlacementError(f"{path}: {where}: count is 0. Give at least 1, or leave the entry out.")
        gpu = Gpu(
            _memory(path, f"{where}: memory", entry["memory"]),
            1e12 * _positive(path, f"{where}: tflops", entry["tflops"]),
            1e9 * _positive(path, f"{where}: memory_gb_per_s", entry["memory_gb_per_s"]),
            node,
        )
        gpus += [gpu] * count
    return gpus


def _of_links(path, links, nodes) -> np.ndarray:
    _check_keys(path, links, "links", _LINK_KEYS, ())
    same = np.equal.outer(nodes, nodes)
    bandwidth = np.zeros(same.shape)
    for key, pairs in zip(_LINK_KEYS, (same & ~np.eye(len(nodes), dtype=bool), ~same), strict=True):
        if key in links:
            bandwidth[pairs] = 1e9 * _positive(path, f"links: {key}", links[key])
        elif pairs.any():
            source, target = np.argwhere(pairs)[0]
            raise PlacementError(
                f"{path}: links lacks {key}, and GPUs {source} and {target} are connected by it. Give it, or "
                "bandwidth_gb_per_s for each two GPUs."
            )
    return bandwidth


def _matrix(path, rows) -> np.ndarray:
    try:
        matrix = np.asarray(rows)
    except ValueError:
        matrix = np.asarray("ragged")
    if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
        raise PlacementError(f"{path}: bandwidth_gb_per_s is no square of numbers. Give a row for each GPU.")
    return 1e9 * matrix


def _check_keys(path, entry, where, known, required) -> None:
    if not isinstance(entry, dict):
        raise PlacementError(f"{path}: {where} is {_short(entry)}. Give an object with {', '.join(known)}.")
    for key in entry:
        if key not in known:
            raise PlacementError(f"{path}: {where} has the unknown key {key!r}. Known: {', '.join(known)}.")
    for key in required:
        if key not in entry:
            raise PlacementError(f"{path}: {where} lacks {key!r}. Known: {', '.join(known)}.")


def _memory(path, name, value) -> int:
    if not isinstance(value, str) or "%" in value:
        raise PlacementError(f'{path}: {name} is {_short(value)}. Give a size with its unit, such as "24GB".')
    try:
        num_bytes = parse_memory(value, name=name, whole_bytes=0)
    except ConfigError:
        num_bytes = 0
    if not num_bytes:
        raise PlacementError(f'{path}: {name} is {_short(value)}. Give a size above 0, such as "24GB" or "22.5GiB".')
    return num_bytes


def _positive(path, name, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PlacementError(f"{path}: {name} is {_short(value)}. Give a number above 0.")
    return float(value)


def _whole(path, name, value) -> int:
    if type(value) is not int or value < 0:
        raise PlacementError(f"{path}: {name} is {_short(value)}. Give a whole number, 0 or more.")
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
