"""Placements without a program: experts in order, at random, and heaviest first.

Every solver has this signature: problem, seed, time_limit_s, progress(done 0 to 1, what) -> Solution.
"""

import time
from collections.abc import Callable

import numpy as np

from moeflow.placement.bounds.balance import with_balance_bound
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution

Progress = Callable[[float, str], None]


def contiguous(
    problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None
) -> Solution:
    """Place experts in order, on each GPU in proportion to its slots, as most engines do by default.

    A replica goes to the GPU with most free slots, and is of the expert with most load per replica not there yet.
    """
    begin = time.perf_counter()
    slots = problem.slots
    edges = np.concatenate([[0], np.cumsum(slots) * problem.num_experts // slots.sum()])
    load = mean_tokens(problem)
    mask = np.zeros((problem.num_layers, problem.num_experts, problem.num_gpus), bool)
    for gpu in range(problem.num_gpus):
        mask[:, edges[gpu] : edges[gpu + 1], gpu] = True
    for layer, held in enumerate(mask):
        for _ in range(problem.num_replicas):
            gpu = int(np.argmax(slots - held.sum(axis=0)))
            held[np.where(held[:, gpu], -1.0, load[layer] / held.sum(axis=1)).argmax(), gpu] = True
    return with_balance_bound(problem, "contiguous", Plan.of_mask(mask), begin)


def random_placement(
    problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None
) -> Solution:
    """Place experts, and replicas of random ones, in random slots."""
    begin = time.perf_counter()
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(problem.num_gpus), problem.slots)
    mask = np.zeros((problem.num_layers, problem.num_experts, problem.num_gpus), bool)
    for held in mask:
        order = rng.permutation(places)
        held[np.arange(problem.num_experts), order[: problem.num_experts]] = True
        for gpu in order[problem.num_experts :][: problem.num_replicas]:
            held[rng.choice(np.flatnonzero(~held[:, gpu])), gpu] = True
    return with_balance_bound(problem, "random", Plan.of_mask(mask), begin)


def greedy(
    problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None
) -> Solution:
    """Place experts heaviest first, each on the GPU with a free slot that finishes it first; no replicas.

    Source: longest processing time first, Graham 1969.
    """
    begin = time.perf_counter()
    copies = np.ones((problem.num_layers, problem.num_experts), int)
    seconds = replica_seconds(problem, copies)
    return with_balance_bound(problem, "greedy", Plan.of_mask(pack(seconds, copies, problem.slots)), begin)


def mean_tokens(problem: Problem) -> np.ndarray:
    """Return [L, E], the expected tokens of each expert in a step, mean over the workloads."""
    shares = np.mean([workload.shares() for workload in problem.workloads], axis=0)
    return shares * problem.step.assignments


def replica_seconds(problem: Problem, copies: np.ndarray) -> np.ndarray:
    """Return [W, L, E, G], the time of one replica on each GPU, in each workload where the worst counts, else [1, ...].

    Args:
        problem: workloads and GPUs.
        copies: [L, E], replicas of each expert, 1 or more.
    """
    tokens = np.stack([workload.shares() for workload in problem.workloads]) * problem.step.assignments / copies
    seconds = problem.step.expert_seconds(tokens, problem.topology)
    return seconds if problem.worst_case else seconds.mean(axis=0, keepdims=True)


def pack(seconds: np.ndarray, copies: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Place replicas heaviest first, an expert's on different GPUs, each on the GPU that finishes it first.

    A replica that finds free slots only on GPUs which hold its expert takes the place of another that can move there;
    where none can, it is left out.

    Args:
        seconds: [W, L, E, G], one replica's time on each GPU; the slowest of the W counts.
        copies: [L, E], replicas of each expert, 1 to G.
        slots: [G], experts of a layer that a GPU may hold.

    Returns:
        [L, E, G] bool, which GPU holds which expert.
    """
    mask = np.zeros(seconds.shape[1:], bool)
    for layer, held in enumerate(mask):
        _pack_layer(seconds[:, layer], copies[layer], slots, held)
    return mask


def _pack_layer(seconds, copies, slots, held) -> None:
    """Pack one layer: seconds [W, E, G], copies [E], slots [G]; fills held [E, G]."""
    done, free = np.zeros((len(seconds), len(slots))), slots.copy()
    gpu: int | None
    for expert in np.argsort(-seconds.mean(axis=(0, 2)), kind="stable"):
        for _ in range(copies[expert]):
            open_gpus = (free > 0) & ~held[expert]
            if open_gpus.any():
                ready = np.where(open_gpus, (done + seconds[:, expert]).max(axis=0), np.inf)
                gpu = int(ready.argmin())
            else:
                gpu = _make_room(seconds, held, free, done, expert)
                if gpu is None:
                    break
            held[expert, gpu] = True
            done[:, gpu] += seconds[:, expert, gpu]
            free[gpu] -= 1


def _make_room(seconds, held, free, done, expert) -> int | None:
    """Move an expert from a full GPU that lacks `expert` to a free one; return the GPU that has room now, or None."""
    for gpu in np.flatnonzero(~held[expert]):
        for target in np.flatnonzero(free > 0):
            movable = np.flatnonzero(held[:, gpu] & ~held[:, target])
            if len(movable):
                other = movable[seconds[:, movable, gpu].max(axis=0).argmin()]
                held[other, [gpu, target]] = False, True
                done[:, gpu] -= seconds[:, other, gpu]
                done[:, target] += seconds[:, other, target]
                free[[gpu, target]] += 1, -1
                return int(gpu)
    return None
