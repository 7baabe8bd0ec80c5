"""Plan files: each expert's GPUs, the solver and the cost, in JSON (docs/placement.md specifies it)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from moeflow.errors import PlacementError
from moeflow.placement.cost import judge
from moeflow.placement.files.atomic_write import write_whole
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.workload import Workload

FORMAT, VERSION = "moeflow-plan", 1


def solution_facts(problem: Problem, solution: Solution, *, seed: int = 0, held_out: Sequence[Workload] = ()) -> dict:
    """Return the facts that a plan's file holds beside the plan.

    Args:
        problem: the solved problem.
        solution: its solution.
        seed: the solver's.
        held_out: workloads of the same model that the solver did not see.
    """
    costs = [judge(solution.plan, workload, problem.topology, problem.step) for workload in held_out]
    return {
        "first_layer": problem.workloads[0].first_layer,
        "solver": solution.solver,
        "status": solution.status,
        "objective_s": solution.objective,
        "bound_s": solution.bound,
        "bound_by": solution.bound_by,
        "gap": solution.gap,
        "time_s": solution.seconds,
        "seed": seed,
        "topology": problem.topology.name,
        "num_replicas": problem.num_replicas,
        "worst_case": problem.worst_case,
        "step": vars(problem.step),
        "workloads": [workload.name for workload in problem.workloads],
        "costs": [cost.summary() for cost in problem.costs(solution.plan)],
        "held_out_workloads": [workload.name for workload in held_out],
        "held_out_costs": [cost.summary() for cost in costs],
    }


def write_plan(path: str | Path, plan: Plan, facts: dict | None = None) -> None:
    """Write a plan's file, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        plan: the placement.
        facts: further facts, see `solution_facts`.

    Raises:
        PlacementError: the file cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION, "num_gpus": plan.num_gpus, **_finite(facts or {})}
    layers = ",\n  ".join(json.dumps(layer, separators=(",", ":")) for layer in plan.experts)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    write_whole(path, f'{text},\n "experts": [\n  {layers}\n ]\n}}\n'.encode())


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        PlacementError: the file is missing, truncated, not a plan's, of a newer version, or holds no valid plan.
    """
    content = _read(path)
    try:
        return Plan(content["num_gpus"], tuple(tuple(map(tuple, layer)) for layer in content["experts"]))
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None


def read_plan_facts(path: str | Path) -> dict:
    """Read a plan file's facts without the placement: see `solution_facts`.

    Raises:
        PlacementError: as `read_plan`.
    """
    return {key: value for key, value in _read(path).items() if key != "experts"}


def _read(path: str | Path) -> dict:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}. Make a plan: moeflow place.") from error
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{path} is truncated or no JSON ({error}). Make the plan again: moeflow place.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlacementError(f'{path} is no plan: its "format" is not "{FORMAT}". Make a plan: moeflow place.')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise PlacementError(f"{path} has version {version!r}. A version is a whole number from 1.")
    if version > VERSION:
        raise PlacementError(
            f"{path} is a plan of version {version}, and this moeflow reads up to {VERSION}. Update moeflow."
        )
    if not _is_whole(content.get("num_gpus"), 1):
        raise PlacementError(f"{path}: num_gpus is {content.get('num_gpus')!r}. It must be a whole number from 1.")
    if not _is_whole(content.setdefault("first_layer", 0), 0):
        raise PlacementError(f"{path}: first_layer is {content['first_layer']!r}. It must be a whole number from 0.")
    experts = content.get("experts")
    if not (
        _is_list(experts)
        and all(_is_list(layer) for layer in experts)
        and all(_is_list(gpus) for layer in experts for gpus in layer)
        and all(_is_whole(gpu, 0) for layer in experts for gpus in layer for gpu in gpus)
    ):
        raise PlacementError(
            f"{path}: experts must be a list of layers, each a list of experts, each a list of GPU numbers. Make the "
            "plan again: moeflow place."
        )
    return content


def _is_list(value: object) -> TypeGuard[list]:
    return isinstance(value, list)


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _finite(value: Any) -> Any:
    """Replace an infinite gap, which JSON cannot hold, by null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
