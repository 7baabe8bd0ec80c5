"""A step, machines and workloads of placement whose costs are easily summed by hand or by a loop."""

import math

import numpy as np

from moeflow.placement.cost import StepShape
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload

STEP = StepShape(assignments=100.0, token_bytes=10, expert_bytes=1000, expert_flops=50, communication="path")


def machine(*flops, memory=math.inf, reading=1e9, link=100.0):
    cards = tuple(Gpu(memory, float(rate), reading) for rate in flops)
    return Topology("machine", cards, np.full((len(flops), len(flops)), link))


def random_workload(seed, num_layers=3, num_experts=5):
    rng = np.random.default_rng(seed)
    shape = (num_layers, num_experts, num_experts)
    together = rng.integers(0, 9, shape)
    together = together + together.transpose(0, 2, 1)
    together[:, np.arange(num_experts), np.arange(num_experts)] = 0
    return Workload("w", rng.integers(1, 50, shape[:2]), rng.integers(0, 9, shape)[1:], together, top_k=2)
