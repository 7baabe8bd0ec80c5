"""The cost of a step, against sums by hand and loops written apart."""

import math

import numpy as np
import pytest

from helpers.placement_parts import STEP, machine, random_workload
from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.plan import Plan
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload


def test_cost_of_two_layers_on_two_gpus_is_the_sum_by_hand():
    workload = Workload("w", [[30, 10], [20, 20]], [[[10, 20], [10, 0]]])
    cost = judge(Plan.of_gpus(2, np.array([[0, 1], [0, 1]])), workload, machine(500, 500), STEP)
    assert cost.tokens == pytest.approx(np.array([[75, 25], [50, 50]]))
    assert cost.compute_s == pytest.approx(np.array([[7.5, 2.5], [5, 5]]))
    # Of 40 transitions 20 go from 0 to 1 and 10 from 1 to 0: 500 and 250 of 1,000 bytes.
    assert cost.path_bytes == pytest.approx(np.array([[[250, 500], [250, 0]]]))
    assert cost.crossing == pytest.approx(0.75)
    assert cost.link_s == pytest.approx([5.0])
    assert cost.step_s == pytest.approx(7.5 + 5 + 5)
    assert cost.imbalance == pytest.approx((1.5 + 1) / 2)
    # Each GPU sends half of a GPU's assignments: 375 bytes to GPU 0 and 125 to GPU 1 in layer 0.
    assert cost.dispatch_bytes[0] == pytest.approx(np.array([[375, 125], [375, 125]]))
    assert cost.dispatch_crossing == pytest.approx(0.5)


def test_few_tokens_cost_the_reading_of_weights_and_a_replica_reads_them_again():
    step = StepShape(assignments=1.0, token_bytes=1, expert_bytes=1000, expert_flops=1, communication="dispatch")
    topology, workload = machine(1e9, 1e9, reading=1000.0), Workload("w", [[1.0]])
    alone, twice = (judge(Plan(2, ((gpus,),)), workload, topology, step) for gpus in ((0,), (0, 1)))
    assert alone.compute_s[0] == pytest.approx([1 - math.exp(-1), 0])
    assert twice.compute_s[0] == pytest.approx([1 - math.exp(-0.5)] * 2)
    assert twice.activated.sum() > alone.activated.sum()


@pytest.mark.parametrize("communication", ["path", "dispatch"])
@pytest.mark.parametrize("seed", range(4))
def test_cost_is_that_of_a_loop_over_replicas(communication, seed):
    rng = np.random.default_rng(seed)
    workload, gpus = random_workload(seed), 3
    step = StepShape(64.0, 3, 700, 11, communication)
    cards = tuple(Gpu(math.inf, *rng.uniform(50, 500, 2)) for _ in range(gpus))
    links = rng.uniform(1, 9, (gpus, gpus))
    mask = rng.random((3, 5, gpus)) < 0.4
    mask[..., 0] |= ~mask.any(axis=2)
    plan = Plan.of_mask(mask)
    cost = judge(plan, workload, Topology("t", cards, links), step)

    total, together, pairs = 0.0, 0.0, 0.0
    for layer in range(3):
        compute, tokens = [0.0] * gpus, [0.0] * gpus
        for expert, held in enumerate(plan.experts[layer]):
            n = workload.load[layer, expert] / workload.load[layer].sum() * 64 / len(held)
            for gpu in held:
                tokens[gpu] += n
                arithmetic, reading = n * 11 / cards[gpu].flops_per_s, 700 / cards[gpu].memory_bytes_per_s
                compute[gpu] += max(arithmetic, (1 - math.exp(-n)) * reading)
            for other, beside in enumerate(plan.experts[layer]):
                count = workload.coactivation[layer, expert, other]
                pairs += count
                together += count * len(set(held) & set(beside)) / len(held) / len(beside)
        assert cost.tokens[layer] == pytest.approx(tokens)
        assert cost.compute_s[layer] == pytest.approx(compute)
        total += max(compute)
        ways = [(a, b) for a in range(gpus) for b in range(gpus) if a != b]
        if communication == "dispatch":
            total += max(tokens[b] / gpus * 3 / links[a, b] for a, b in ways)
            total += max(tokens[b] / gpus * 3 / links[b, a] for a, b in ways)
        elif layer < 2:
            sent = dict.fromkeys(ways, 0.0)
            for (i, j), count in np.ndenumerate(workload.transitions[layer]):
                sources, targets = plan.experts[layer][i], plan.experts[layer + 1][j]
                share = count / workload.transitions[layer].sum() / len(sources) / len(targets)
                for a in sources:
                    for b in targets:
                        if a != b:
                            sent[a, b] += share * 64 * 3
            assert max(sent.values()) > 0
            total += max(amount / links[way] for way, amount in sent.items())
    assert cost.step_s == pytest.approx(total)
    assert cost.colocated == pytest.approx(together / pairs)


def test_numbering_the_gpus_otherwise_changes_no_cost_on_a_uniform_machine():
    workload, rng = random_workload(1), np.random.default_rng(1)
    gpus, order = rng.integers(0, 4, (3, 5)), rng.permutation(4)
    first, second = (judge(Plan.of_gpus(4, g), workload, machine(*[500] * 4), STEP) for g in (gpus, order[gpus]))
    assert first.summary() == pytest.approx(second.summary())


def test_one_gpu_crosses_nothing_and_one_layer_has_no_path():
    cost = judge(Plan.of_gpus(1, np.zeros((3, 5), int)), random_workload(0), machine(500), STEP)
    assert cost.crossing == cost.dispatch_crossing == 0
    assert cost.imbalance == cost.colocated == 1
    single = Workload("w", [[1, 3]], np.empty((0, 2, 2)))
    assert judge(Plan.of_gpus(2, np.array([[0, 1]])), single, machine(500, 500), STEP).link_s.sum() == 0


def test_cost_of_what_does_not_belong_together_is_refused():
    workload = random_workload(0)
    with pytest.raises(PlacementError, match="3 layers of 4 experts"):
        judge(Plan.of_gpus(2, np.zeros((3, 4), int)), workload, machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="for 3 GPUs"):
        judge(Plan.of_gpus(3, np.zeros((3, 5), int)), workload, machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="ask for communication by dispatch"):
        judge(Plan.of_gpus(2, np.zeros((3, 5), int)), Workload("w", workload.load), machine(1, 1), STEP)


@pytest.mark.parametrize(
    ("field", "value"),
    [("assignments", 0.0), ("assignments", math.nan), ("token_bytes", -1), ("expert_bytes", 0),
     ("expert_flops", math.inf), ("communication", "pigeon")],
)  # fmt: skip
def test_step_that_cannot_be_is_refused(field, value):
    with pytest.raises(PlacementError, match=field):
        StepShape(**{field: value})
