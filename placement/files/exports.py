"""Plans in the formats of other engines: physical experts in a row, GPU after GPU (docs/placement.md).

Engines number slots, "physical experts", and give every GPU equally many of them in every layer: slot p is on GPU
p // slots_per_gpu. Where a plan leaves slots free, they hold second copies of the same GPU's experts, the most loaded
first. Experts that no other GPU holds come before all others, so that an engine which shares tokens equally over copies
sends every GPU the plan's tokens.

Sources: sglang/srt/eplb/expert_location.py (init_by_mapping), deepseek-ai/EPLB eplb.py (rebalance_experts), vLLM
vllm/distributed/eplb/eplb_state.py (shapes).
"""

import io
import json
from pathlib import Path

import numpy as np

from moeflow.atomic_file import write_atomically
from moeflow.errors import PlacementError
from moeflow.placement.plan import Plan

EXPORTS = {"sglang": (".json",), "eplb": (".json", ".npz"), "npz": (".npz",)}  # kind -> suffixes


def export_plan(
    kind: str,
    path: str | Path,
    plan: Plan,
    *,
    load: np.ndarray | None = None,
    first_layer: int = 0,
    most: np.ndarray | None = None,
) -> dict:
    """Write a plan for an engine, whole or not at all.

    Args:
        kind: a name in `EXPORTS`.
        path: the file: .json for sglang, .json or .npz for eplb, .npz for npz.
        plan: the placement.
        load: [L, E], by which free slots are filled; equal when None.
        first_layer: dense layers before the first MoE layer; sglang's file has rows for them.
        most: [G], experts of a layer each GPU has memory for; no limit when None.

    Returns:
        Settings for the engine: num_physical_experts, num_redundant_experts, num_filled (slots a plan left free).

    Raises:
        PlacementError: an unknown kind, another suffix, a GPU too small for as many slots as the others, or a file
            that cannot be written.
    """
    suffix = check_export(kind, path)
    if kind == "npz":
        write_atomically(path, _npz(plan_ranks(plan)), PlacementError)
        return {"num_filled": 0}
    physical = physical_to_logical(plan, load, most)
    if kind == "sglang":
        # Every layer of the model has a row; the rows of dense layers are never read, and spread evenly.
        dense = np.tile(np.arange(physical.shape[1]) % plan.num_experts, (first_layer, 1))
        arrays = {"physical_to_logical_map": np.concatenate([dense, physical])}
    else:
        arrays = eplb_maps(physical, plan.num_experts)
    if suffix == ".npz":
        content = _npz(arrays)
    else:
        content = json.dumps({name: array.tolist() for name, array in arrays.items()}).encode()
    write_atomically(path, content, PlacementError)
    return {
        "num_physical_experts": physical.shape[1],
        "num_redundant_experts": physical.shape[1] - plan.num_experts,
        "num_filled": int(physical.size - plan.copies().sum()),
    }


def check_export(kind: str, path: str | Path) -> str:
    """Return the suffix of an export's file.

    Raises:
        PlacementError: an unknown kind, or a suffix that it does not take.
    """
    if kind not in EXPORTS:
        raise PlacementError(f"export {kind!r} is unknown. Allowed: {', '.join(EXPORTS)}.")
    suffix = Path(path).suffix.lower()
    if suffix not in EXPORTS[kind]:
        raise PlacementError(
            f"{path} does not suit the export {kind}: its name must end in {' or '.join(EXPORTS[kind])}."
        )
    return suffix


def physical_to_logical(plan: Plan, load: np.ndarray | None = None, most: np.ndarray | None = None) -> np.ndarray:
    """Return [L, P], the expert in each slot; slot p is on GPU p // (P / G).

    Args:
        plan: the placement.
        load: [L, E], by which free slots are filled; equal when None.
        most: [G], experts of a layer each GPU has memory for; no limit when None.

    Raises:
        PlacementError: a GPU has no memory for as many slots as the fullest.
    """
    copies = plan.copies()
    slots = int(copies.max())
    if most is not None and (np.asarray(most) < slots).any():
        gpu = int(np.argmax(np.asarray(most) < slots))
        raise PlacementError(
            f"the engine wants {slots} slots of every layer on each GPU, and GPU {gpu} has memory for {most[gpu]}. "
            "Export as npz, or plan for equal GPUs."
        )
    load = np.ones((plan.num_layers, plan.num_experts)) if load is None else np.asarray(load)
    replicas = plan.num_replicas
    physical = np.empty((plan.num_layers, plan.num_gpus, slots), np.int64)
    for layer in range(plan.num_layers):
        for gpu in range(plan.num_gpus):
            held = plan.experts_of(layer, gpu)
            if not held:
                raise PlacementError(
                    f"the plan leaves GPU {gpu} without an expert of layer {layer}, and engines want as many on each. "
                    "Export as npz, or use fewer GPUs."
                )
            # Sole copies come first, then higher loads; the sort is stable, so ties go by number.
            order = sorted(held, key=lambda expert: (replicas[layer, expert] > 1, -load[layer, expert]))
            filling = [order[number % len(order)] for number in range(slots - len(held))]
            physical[layer, gpu] = held + filling
    return physical.reshape(plan.num_layers, -1)


def eplb_maps(physical: np.ndarray, num_experts: int) -> dict[str, np.ndarray]:
    """Return the three maps of EPLB.

    Args:
        physical: [L, P], the expert in each slot.
        num_experts: E.

    Returns:
        physical_to_logical_map [L, P]; logical_to_physical_map [L, E, X], each expert's slots, ascending, padded with
        -1; logical_replica_count [L, E].
    """
    layers = range(len(physical))
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in physical])
    slots_of = np.full((len(physical), num_experts, counts.max()), -1, np.int64)
    for layer in layers:
        for expert in range(num_experts):
            slots = np.flatnonzero(physical[layer] == expert)
            slots_of[layer, expert, : len(slots)] = slots
    return {
        "physical_to_logical_map": physical,
        "logical_to_physical_map": slots_of,
        "logical_replica_count": counts.astype(np.int64),
    }


def plan_ranks(plan: Plan) -> dict[str, np.ndarray]:
    """Return ranks [L, E, max replicas] int32, the GPUs of each expert, ascending, padded with -1; num_replicas
    [L, E] int32; and num_gpus."""
    replicas = plan.num_replicas
    ranks = np.full((*replicas.shape, replicas.max()), -1, np.int32)
    for layer, experts in enumerate(plan.experts):
        for expert, gpus in enumerate(experts):
            ranks[layer, expert, : len(gpus)] = gpus
    return {"ranks": ranks, "num_replicas": replicas.astype(np.int32), "num_gpus": np.int32(plan.num_gpus)}


def _npz(arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
