"""Readers of what `exports` writes, each from its engine's documented form: which GPU serves which expert.

They know the engine's rules and nothing of how a plan was written. They also take maps that engines made themselves.
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.plan import Plan


def read_sglang(path: str | Path, num_gpus: int, num_experts: int, *, first_layer: int = 0) -> Plan:
    """Read SGLang's --init-expert-location: physical_to_logical_map, [layers of the model, physical experts].

    Args:
        path: the JSON file.
        num_gpus: the size of expert parallelism.
        num_experts: E, of the model.
        first_layer: dense layers before the first MoE layer; their rows are left out.

    Raises:
        PlacementError: the file is missing or malformed, GPUs would have unequal numbers of slots, or an expert none.
    """
    maps = _read(path, ("physical_to_logical_map",))
    return _plan_of_slots(path, maps["physical_to_logical_map"][first_layer:], num_gpus, num_experts)


def read_eplb(path: str | Path, num_gpus: int) -> Plan:
    """Read EPLB's three maps, .json or .npz, and check them against each other.

    Raises:
        PlacementError: as `read_sglang`, or the maps contradict each other.
    """
    names = ("physical_to_logical_map", "logical_to_physical_map", "logical_replica_count")
    physical, slots_of, counts = _read(path, names).values()
    if slots_of.ndim != 3 or counts.shape != slots_of.shape[:2] or physical.shape[:1] != counts.shape[:1]:
        raise PlacementError(f"{path}: the maps are of different shapes. Export the plan again.")
    plan = _plan_of_slots(path, physical, num_gpus, counts.shape[1])
    valid = slots_of >= 0
    layers, experts, _ = np.nonzero(valid)
    if (
        (valid.sum(axis=2) != counts).any()
        or (slots_of >= physical.shape[1]).any()
        or (physical[layers, slots_of[valid]] != experts).any()
        or counts.sum() != physical.size
    ):
        raise PlacementError(f"{path}: logical_to_physical_map is not the inverse of physical_to_logical_map.")
    return plan


def read_ranks(path: str | Path) -> Plan:
    """Read an .npz of ranks [L, E, max replicas], padded with -1, num_replicas [L, E] and num_gpus.

    Raises:
        PlacementError: the file is missing or malformed, or its plan is none.
    """
    ranks, replicas, num_gpus = _read(path, ("ranks", "num_replicas", "num_gpus")).values()
    if ranks.ndim != 3 or not np.array_equal((ranks >= 0).sum(axis=2), replicas) or num_gpus.shape:
        raise PlacementError(f"{path}: ranks and num_replicas contradict each other. Export the plan again.")
    experts = tuple(tuple(tuple(gpus[gpus >= 0].tolist()) for gpus in layer) for layer in ranks)
    return Plan(int(num_gpus), experts)


def _plan_of_slots(path, physical, num_gpus, num_experts) -> Plan:
    if physical.ndim != 2 or not physical.size or physical.shape[1] % num_gpus:
        raise PlacementError(
            f"{path}: physical_to_logical_map has shape {list(physical.shape)}, which does not give each of "
            f"{num_gpus} GPUs as many slots of every layer."
        )
    if physical.min() < 0 or physical.max() >= num_experts:
        raise PlacementError(f"{path}: physical_to_logical_map names experts outside 0 to {num_experts - 1}.")
    gpus = np.arange(physical.shape[1]) // (physical.shape[1] // num_gpus)
    mask = np.zeros((len(physical), num_experts, num_gpus), bool)
    for layer, row in enumerate(physical):
        mask[layer, row, gpus] = True
    return Plan.of_mask(mask)


def _read(path, names) -> dict[str, np.ndarray]:
    try:
        if Path(path).suffix.lower() == ".npz":
            with np.load(path) as archive:
                content = {name: archive[name] for name in archive.files}
        else:
            content = json.loads(Path(path).read_bytes())
        arrays = {name: np.asarray(content[name]) for name in names}
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}. Export a plan first.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, TypeError) as error:
        raise PlacementError(f"{path} is not an export with {', '.join(names)} ({error!r}).") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise PlacementError(f"{path}: {name} is not an array of whole numbers. Export the plan again.")
    return arrays
