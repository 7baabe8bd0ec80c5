"""Small placement problems, every plan of one, and random plans."""

import itertools

import numpy as np

from moeflow.placement.cost import StepShape
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload

EXPERT_BYTES = EXPERT_FLOPS = 12288


def plans_within(slots, num_layers, num_experts):
    """Every plan within the slots, replicas as the slots allow."""
    num_gpus = len(slots)
    subsets = [c for r in range(1, num_gpus + 1) for c in itertools.combinations(range(num_gpus), r)]
    layers = []
    for layer in itertools.product(subsets, repeat=num_experts):
        if all(sum(gpu in gpus for gpus in layer) <= slots[gpu] for gpu in range(num_gpus)):
            layers.append(layer)
    return (Plan(num_gpus, plan) for plan in itertools.product(layers, repeat=num_layers))


def random_plan(rng, slots, num_layers, num_experts):
    places = np.repeat(np.arange(len(slots)), slots)
    mask = np.zeros((num_layers, num_experts, len(slots)), bool)
    for held in mask:
        order = rng.permutation(places)
        held[np.arange(num_experts), order[:num_experts]] = True
        for gpu in order[num_experts:]:
            if rng.random() < 0.7:
                held[rng.choice(np.flatnonzero(~held[:, gpu])), gpu] = True
    return Plan.of_mask(mask)


def random_problem(seed, *, experts=(2, 9), gpus=(1, 5), layers=(1, 3)):
    """Unequal GPUs, links and workloads, either communication, mean or worst, decode to prefill."""
    rng = np.random.default_rng(seed)
    num_experts, num_gpus, num_layers = (int(rng.integers(*bounds)) for bounds in (experts, gpus, layers))
    num_gpus = min(num_gpus, num_experts)
    each = EXPERT_BYTES * num_layers
    speeds = rng.choice([1.0, 1.0, 2.0, 3.0], (num_gpus, 2))
    fewest = -(-num_experts // num_gpus)
    memory = each * rng.integers(fewest, num_experts + 1, num_gpus)
    cards = tuple(Gpu(float(m), 1e6 * f, 1e6 * b) for (f, b), m in zip(speeds, memory, strict=True))
    links = 1e5 * rng.choice([1.0, 2.0, 5.0], (num_gpus, num_gpus))
    workloads = []
    for name in range(int(rng.integers(1, 4))):
        load = rng.gamma(0.5, size=(num_layers, num_experts)) + 1e-3
        workloads.append(Workload(f"w{name}", load, rng.random((num_layers - 1, num_experts, num_experts))))
    step = StepShape(
        assignments=float(rng.choice([2.0, 16.0, 1000.0])),
        token_bytes=128,
        expert_bytes=EXPERT_BYTES,
        expert_flops=EXPERT_FLOPS,
        communication=str(rng.choice(["path", "dispatch"])),
    )
    room = min(int(sum(memory) // each), num_experts * num_gpus) - num_experts
    replicas = int(rng.integers(0, min(room, 4) + 1))
    return Problem(workloads, Topology("t", cards, links), step, replicas, bool(rng.integers(2)))


def machine(*speeds):
    cards = tuple(Gpu(1e12, 1e6 * speed, 1e12) for speed in speeds)
    return Topology("machine", cards, np.full((len(speeds), len(speeds)), 1e9))


def layers_within(slots, num_experts):
    """[N, E, G], the shares of every placement of one layer within the slots, replicas as they allow."""
    return np.concatenate([plan.shares() for plan in plans_within(slots, 1, num_experts)])
