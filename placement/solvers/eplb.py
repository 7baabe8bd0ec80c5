"""Replicas of the busiest experts, packed heaviest first: the idea of DeepSeek's EPLB, its global policy.

Here a GPU holds an expert at most once, since a second copy on the same GPU takes memory and serves nothing; EPLB's own
packing may put two there. So no expert gets more replicas than there are GPUs.

Source: the expert parallelism load balancer that DeepSeek published with DeepSeek-V3 (github.com/deepseek-ai/EPLB).
"""

import time

import numpy as np

from moeflow.placement.bounds.balance import with_balance_bound
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.solvers.baselines import Progress, mean_tokens, pack


def eplb(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None) -> Solution:
    """Give each replica to the expert with most tokens per replica, then pack all by their tokens.

    As published, only tokens count, the mean of several workloads; on GPUs of unequal speed, tokens over speed.
    """
    begin = time.perf_counter()
    load = mean_tokens(problem)
    copies = replicate(load, problem.num_replicas, problem.num_gpus)
    flops = np.array([gpu.flops_per_s for gpu in problem.topology.gpus])
    mask = pack((load / copies)[None, ..., None] / flops, copies, problem.slots)
    return with_balance_bound(problem, "eplb", Plan.of_mask(mask), begin)


def replicate(load: np.ndarray, num_replicas: int, most: int) -> np.ndarray:
    """Count the replicas of each expert.

    Args:
        load: [L, E], tokens of each expert.
        num_replicas: replicas a layer beyond one for each expert.
        most: replicas an expert may have.

    Returns:
        [L, E], 1 to most, each row summing to E + num_replicas.
    """
    copies = np.ones(load.shape, int)
    rows = np.arange(len(load))
    for _ in range(num_replicas):
        each = np.where(copies < most, load / copies, -1.0)
        copies[rows, each.argmax(axis=1)] += 1
    return copies
