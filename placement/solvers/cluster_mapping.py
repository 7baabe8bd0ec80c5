"""The mapping of clusters of experts to GPUs under which tokens lose least time on links between layers.

Clusters move only between GPUs of equal speed and slots, so compute does not change. With few such orders a dynamic
program finds the best chain of them by the sum over the layers of the slowest transfer. With more, sweeps forwards and
backwards give each layer the best order for its neighbours' orders until nothing improves: an assignment problem by
bytes over bandwidth, summed over the links, since the slowest link is not linear.

Source: the second program of MoETuner (arXiv 2502.06643, section 4.2), there quadratic.
"""

import itertools
import math
import time

import numpy as np

from moeflow.placement.problem import Problem
from moeflow.placement.solvers.assignment import assign

_MAX_ORDERS = 120  # a pair of layers costs their square


def map_clusters(problem: Problem, shares: np.ndarray, deadline: float = math.inf) -> tuple[np.ndarray, bool]:
    """Choose the GPU of each cluster.

    Args:
        problem: gives transitions, links and which GPUs are alike.
        shares: [L, E, G], the share of each expert's tokens in each cluster; cluster g fits GPU g.
        deadline: `time.perf_counter()` after which the best so far is returned.

    Returns:
        [L, G], the GPU of each cluster, and whether the search ended before the deadline.
    """
    alike = _alike(problem)
    if problem.step.communication == "dispatch":
        return _by_tokens(problem, shares, alike), True
    traffic = cluster_bytes(problem, shares)
    if math.prod(math.factorial(len(group)) for group in alike) <= _MAX_ORDERS:
        return _best_chain(problem, traffic, alike), True
    return _sweep(problem, traffic.mean(axis=0), alike, deadline)


def cluster_bytes(problem: Problem, shares: np.ndarray) -> np.ndarray:
    """Return [W, L - 1, G, G], bytes from each cluster to each of the next layer in each workload's step."""
    out = np.empty((len(problem.workloads), len(shares) - 1, *2 * (shares.shape[2],)))
    for w, workload in enumerate(problem.workloads):
        for layer, counts in enumerate(workload.known_transitions()):
            out[w, layer] = shares[layer].T @ counts @ shares[layer + 1] / max(counts.sum(), 1e-300)
    return out * problem.step.assignments * problem.step.token_bytes


def slowest_transfers(problem: Problem, traffic: np.ndarray, order: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Return [...], the slowest link's time between two layers, by the mean of the workloads or the worst.

    Args:
        problem: gives the links.
        traffic: [W, G, G] bytes between the two layers' clusters.
        order: [..., G], the GPU of each cluster of the first layer.
        following: [..., G], the same of the second.
    """
    bandwidth = problem.topology.bandwidth_bytes_per_s[order[..., :, None], following[..., None, :]]
    seconds = np.stack([(counts / bandwidth).max(axis=(-2, -1)) for counts in traffic])
    return seconds.max(axis=0) if problem.worst_case else seconds.mean(axis=0)


def _alike(problem) -> list[list[int]]:
    """Return lists of GPUs of equal speed and slots."""
    groups: dict[tuple[float, float, int], list[int]] = {}
    for number, gpu in enumerate(problem.topology.gpus):
        mark = gpu.flops_per_s, gpu.memory_bytes_per_s, int(problem.slots[number])
        groups.setdefault(mark, []).append(number)
    return list(groups.values())


def _by_tokens(problem, shares, alike) -> np.ndarray:
    """Give clusters with most tokens the fastest links: in dispatch transfers depend on a cluster's tokens alone."""
    tokens = np.mean([np.einsum("le,leg->lg", w.shares(), shares) for w in problem.workloads], axis=0)
    bandwidth = problem.topology.bandwidth_bytes_per_s
    per_token = 1 / bandwidth.min(axis=0) + 1 / bandwidth.min(axis=1)
    order = np.tile(np.arange(problem.num_gpus), (len(tokens), 1))
    for group in map(np.array, alike):
        fastest = group[np.argsort(per_token[group], kind="stable")]
        for layer, each in enumerate(tokens):
            order[layer, group[np.argsort(-each[group], kind="stable")]] = fastest
    return order


def _best_chain(problem, traffic, alike) -> np.ndarray:
    """Solve a dynamic program over the layers; a state is an order of the clusters."""
    orders = np.array([_order(alike, chosen) for chosen in itertools.product(*map(itertools.permutations, alike))])
    seconds, came_from = np.zeros(len(orders)), []
    for layer in range(traffic.shape[1]):
        steps = slowest_transfers(problem, traffic[:, layer], orders[:, None], orders[None])
        total = seconds[:, None] + steps
        came_from.append(total.argmin(axis=0))
        seconds = total.min(axis=0)
    states = [int(seconds.argmin())]
    for before in reversed(came_from):
        states.append(int(before[states[-1]]))
    return orders[states[::-1]]


def _order(alike, chosen) -> list[int]:
    order = [0] * sum(map(len, alike))
    for group, places in zip(alike, chosen, strict=True):
        for cluster, gpu in zip(group, places, strict=True):
            order[cluster] = gpu
    return order


def _sweep(problem, traffic, alike, deadline) -> tuple[np.ndarray, bool]:
    """Sweep over the layers by traffic [L - 1, G, G] bytes."""
    num_layers = len(traffic) + 1
    per_byte = 1 / problem.topology.bandwidth_bytes_per_s  # 0 on the diagonal
    order = np.tile(np.arange(problem.num_gpus), (num_layers, 1))
    layers = list(range(num_layers))
    total = np.inf
    while True:
        for layer in layers:
            if time.perf_counter() > deadline:
                return order, False
            costs = np.zeros((problem.num_gpus, problem.num_gpus))  # of each cluster on each GPU
            if layer:
                costs += traffic[layer - 1].T @ per_byte[order[layer - 1]]
            # In the first sweep the layers behind have no order yet.
            if layer + 1 < num_layers and total < np.inf:
                costs += traffic[layer] @ per_byte[:, order[layer + 1]].T
            for group in map(np.array, alike):
                order[layer, group] = group[assign(costs[np.ix_(group, group)])]
        before, layers = total, layers[::-1]
        pairs = zip(traffic, order, order[1:], strict=False)
        total = sum(float((counts * per_byte[np.ix_(a, b)]).sum()) for counts, a, b in pairs)
        if total >= before * (1 - 1e-9):
            return order, True
