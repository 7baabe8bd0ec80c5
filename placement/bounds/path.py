"""A proven bound on a step by path: the partition's relaxation with a problem's speeds, links and slots.

Only terms that hold for every plan enter. A transition between two GPUs costs at least the mean over all pairs of GPUs,
each by its own bandwidth, and the mean at least the fastest link's; between nodes every link is slower, and the
difference is a second partition, of nodes. Where GPUs differ in speed, the LP bounds the work of a layer by itself.
Several workloads count with their mean; neither their mean time nor their worst time is below it.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moeflow.placement.bounds.balance import balance_bound
from moeflow.placement.bounds.partition import Partition, partition_bound
from moeflow.placement.tables import Tables


def path_bound(
    tables: Tables, *, time_limit_s: float = float("inf"), progress: Callable[[float], None] | None = None
) -> float:
    """Return a lower bound in seconds on `Annealing.objective`, and where balance is 1 on `Problem.objective`.

    Args:
        tables: a problem by path, on two GPUs or more, with the mean over the links.
        time_limit_s: after which the best bound so far is returned.
        progress: called with the share done.
    """
    problem = tables.problem
    assert tables.traffic is not None, "tables by path, with the mean over the links"
    alike = len({(gpu.flops_per_s, gpu.memory_bytes_per_s) for gpu in problem.topology.gpus}) == 1
    nodes, within, between = _levels(problem, tables.distance)
    share = 1.0 if between is None else 0.5
    whole = partition_bound(
        Partition(
            within * tables.traffic,
            _work(tables) if alike else None,
            problem.num_gpus,
            int(problem.slots.max()),
            tables.free_slots == 0 and problem.num_replicas == 0 and len(set(problem.slots.tolist())) == 1,
        ),
        time_limit_s=share * time_limit_s,
        progress=progress,
    )
    if not alike:
        whole += tables.balance * balance_bound(replace(problem, worst_case=False))  # the mean, as the traffic's
    if between is not None:
        room = np.array([problem.slots[nodes == node].sum() for node in np.unique(nodes)])
        whole += partition_bound(
            Partition(
                (between - within) * tables.traffic,
                None,
                len(room),
                int(room.max()),
                tables.free_slots == 0 and problem.num_replicas == 0 and len(set(room.tolist())) == 1,
            ),
            time_limit_s=share * time_limit_s,
        )
    return whole


def _work(tables) -> np.ndarray:
    """Return [L, E], the seconds of each expert's only copy on equal GPUs, mean over the workloads."""
    one_copy = np.ones(tables.tokens.shape[1:], np.int64)
    return np.einsum("w,wle->le", tables.weights, tables.seconds(one_copy)[..., 0])


def _levels(problem, distance) -> tuple[np.ndarray, float, float | None]:
    """Return nodes [G], the least distance of two GPUs, and that of two nodes (None where it is no larger)."""
    apart = ~np.eye(problem.num_gpus, dtype=bool)
    nodes = np.array(problem.topology.nodes)
    across = nodes[:, None] != nodes
    within = float(distance[apart].min())
    between = float(distance[across].min()) if across.any() else within
    if between <= within or not (apart & ~across).any():
        return nodes, min(within, between), None
    return nodes, float(distance[apart & ~across].min()), between
