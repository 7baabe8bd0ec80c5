"""What placement is judged by: counts, machines, plans and costs, against sums by hand and loops written apart."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.plan import Plan, replica_of
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.topology import Gpu, Topology, preset
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


# --- workloads


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ([1, 2, 3], r"shape \[3\]"),
        (np.empty((0, 4)), "none of them 0"),
        ([[1, 2], [3]], "equally long"),
        ([[1, 2], [3, -1]], r"\[1, 1\] is -1"),
        ([[1, math.nan]], "nan"),
        ([[1, math.inf]], "inf"),
        ([["a", "b"]], "not an array of numbers"),
        ([[1, 2], [0, 0]], "row 1"),
    ],
)
def test_counts_that_cannot_be_are_refused(load, says):
    with pytest.raises(PlacementError, match=says):
        Workload("w", load)


@pytest.mark.parametrize("name", ["transitions", "coactivation"])
def test_pair_counts_of_a_wrong_shape_or_sign_are_refused(name):
    with pytest.raises(PlacementError, match=name):
        Workload("w", np.ones((3, 4)), **{name: np.ones((3, 4, 5))})
    right = (2, 4, 4) if name == "transitions" else (3, 4, 4)
    with pytest.raises(PlacementError, match=rf"{name} at \[0, 0, 0\]"):
        Workload("w", np.ones((3, 4)), **{name: -np.ones(right)})


def test_dense_layers_before_all_others_are_left_out_and_counted():
    load = np.array([[0, 0], [0, 0], [1, 3], [2, 2]])
    workload = Workload.of_counts("w", load)
    assert workload.first_layer == 2
    assert workload.shape == (2, 2)
    with pytest.raises(PlacementError, match="no load"):
        Workload.of_counts("w", np.array([[1, 3], [0, 0], [2, 2]]))
    with pytest.raises(PlacementError, match="no load"):
        Workload.of_counts("w", np.zeros((2, 2)))


def test_routes_are_counted_like_a_loop_counts_them():
    rng = np.random.default_rng(0)
    routes = np.stack([rng.permutation(6)[:3] for _ in range(40 * 4)]).reshape(40, 4, 3)
    routes[rng.random(routes.shape) < 0.1] = 255  # none
    workload = Workload.of_routes("w", routes, 6)
    load, following, together = np.zeros((4, 6)), np.zeros((3, 6, 6)), np.zeros((4, 6, 6))
    for token in routes.tolist():
        for layer, experts in enumerate(token):
            for one in experts:
                if one == 255:
                    continue
                load[layer, one] += 1
                for other in experts:
                    if other not in (255, one):
                        together[layer, one, other] += 1
                if layer + 1 < 4:
                    for after in token[layer + 1]:
                        if after != 255:
                            following[layer, one, after] += 1
    assert (workload.load == load).all()
    assert (workload.transitions == following).all()
    assert (workload.coactivation == together).all()
    assert workload.top_k == 3


# --- topologies


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory_bytes", 0), ("memory_bytes", -1.0), ("memory_bytes", math.nan), ("flops_per_s", 0.0),
     ("flops_per_s", math.inf), ("memory_bytes_per_s", math.nan)],
)  # fmt: skip
def test_gpu_without_memory_or_speed_is_refused_by_name(field, value):
    good = {"memory_bytes": 1e9, "flops_per_s": 1e12, "memory_bytes_per_s": 1e11}
    cards = (Gpu(**good), Gpu(**{**good, field: value}))
    with pytest.raises(PlacementError, match=f"GPU 1 has {field}"):
        Topology("t", cards, np.ones((2, 2)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_disconnected_topology_is_refused_and_the_pair_named(value):
    links = np.ones((3, 3))
    links[2, 1] = value
    with pytest.raises(PlacementError, match="not connected: GPU 2 to GPU 1"):
        Topology("t", machine(1, 1, 1).gpus, links)


def test_malformed_topologies_are_refused():
    cards = machine(1, 1).gpus
    with pytest.raises(PlacementError, match="no GPU"):
        Topology("t", (), np.ones((0, 0)))
    with pytest.raises(PlacementError, match=r"Give \[2, 2\]"):
        Topology("t", cards, np.ones((3, 3)))
    with pytest.raises(PlacementError, match="square of numbers"):
        Topology("t", cards, [[1, 2], [3]])
    with pytest.raises(PlacementError, match="neither a file nor known"):
        preset("ring", 4)
    with pytest.raises(PlacementError, match="odd"):
        preset("two-nodes", 3)
    with pytest.raises(PlacementError, match="1 or more"):
        preset("nvlink", 0)


def test_presets_put_slow_links_between_nodes_only():
    topology = preset("two-nodes", 4)
    links = topology.bandwidth_bytes_per_s
    assert topology.nodes == (0, 0, 1, 1)
    assert links[0, 1] == links[2, 3] > links[1, 2] == links[0, 3]
    assert preset("pcie", 1).num_gpus == 1


# --- plans


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ((), "without experts"),
        ((((0,), ()),), "expert 1 of layer 0"),
        ((((0,), (1, 1)),), r"GPUs \[1, 1\]"),
        ((((0,), (2,)),), "from 0 to 1"),
        ((((0,), (-1,)),), "from 0 to 1"),
        ((((0,), (1,)), ((0,),)), "same number"),
    ],
)
def test_plan_that_cannot_be_is_refused(experts, says):
    with pytest.raises(PlacementError, match=says):
        Plan(2, experts)


def test_plan_reads_the_same_from_lists_mask_and_numbers():
    plan = Plan(3, (((2, 0), (1,)), ((1,), (2,))))
    assert plan.experts[0][0] == (0, 2)
    assert Plan.of_mask(plan.mask()) == plan
    assert Plan.of_gpus(3, np.array([[0, 1], [1, 2]])).experts == (((0,), (1,)), ((1,), (2,)))
    assert plan.num_replicas.tolist() == [[2, 1], [1, 1]]
    assert plan.copies().tolist() == [[1, 1, 1], [0, 1, 1]]
    assert plan.experts_of(0, 2) == [0]
    assert (plan.shares().sum(axis=2) == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_assignments_are_those_of_routing_token_by_token(seed):
    rng = np.random.default_rng(seed)
    gpus, layers, experts = (int(rng.integers(1, 5)) for _ in range(3))
    mask = rng.random((layers, experts, gpus)) < 0.5
    mask[..., 0] |= ~mask.any(axis=2)
    plan, counts = Plan.of_mask(mask), rng.integers(0, 9, (gpus, layers, experts))
    expected = np.zeros((layers, gpus, gpus), int)
    for home in range(gpus):
        for layer in range(layers):
            for expert in range(experts):
                for index in range(counts[home, layer, expert]):
                    expected[layer, home, replica_of(plan.experts[layer][expert], home, index)] += 1
    assert (plan.assignments(counts) == expected).all()


# --- cost


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


# --- problems


def test_slots_are_equal_where_memory_allows_and_others_take_more_where_not():
    workload = random_workload(0, 2, 10)
    problem = Problem([workload], machine(1, 1, 1, 1), STEP)
    assert problem.slots.tolist() == [3, 3, 3, 3]
    assert Problem([workload], machine(1, 1, 1, 1), STEP, num_replicas=6).slots.tolist() == [4, 4, 4, 4]
    cards = tuple(Gpu(memory, 1.0, 1.0) for memory in (2 * 1000 * 1, 2 * 1000 * 20, 2 * 1000 * 4.9))
    tight = Problem([workload], Topology("t", cards, np.ones((3, 3))), STEP)
    assert tight.slots.tolist() == [1, 5, 4]


def test_problems_without_a_plan_are_refused():
    workload = random_workload(0)
    with pytest.raises(PlacementError, match="no workload"):
        Problem([], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="counts of one model"):
        Problem([workload, random_workload(0, 3, 6)], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="ask for communication by dispatch"):
        Problem([workload, Workload("other", workload.load)], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="hold 4 experts of each layer, and 5 are to be placed"):
        Problem([workload], machine(1, 1, memory=3 * 1000 * 2.5), STEP)
    with pytest.raises(PlacementError, match="at most 5 GPUs"):
        Problem([workload], machine(*[1] * 6), STEP)
    assert Problem([workload], machine(*[1] * 6), STEP, num_replicas=1).slots.tolist() == [1] * 6
    with pytest.raises(PlacementError, match="Give 0 or more"):
        Problem([workload], machine(1, 1), STEP, num_replicas=-1)
    with pytest.raises(PlacementError, match="room for 5"):
        Problem([workload], machine(1, 1), STEP, num_replicas=6)


def test_plan_beyond_the_slots_is_refused_by_gpu_and_layer():
    problem = Problem([random_workload(0)], machine(1, 1), STEP)
    problem.check(Plan.of_gpus(2, np.array([[0, 0, 0, 1, 1]] * 3)))
    with pytest.raises(PlacementError, match="4 experts of layer 1 on GPU 0, which has 3 slots"):
        problem.check(Plan.of_gpus(2, np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]])))


def test_plan_with_more_copies_than_experts_and_replicas_is_refused_though_slots_are_free():
    problem = Problem((random_workload(0),), machine(1, 1), StepShape())
    assert problem.slots.tolist() == [3, 3]  # for 5 experts
    experts = (((0,), (0,), (0, 1), (1,), (1,)), *((((0,), (0,), (0,), (1,), (1,)),) * 2))
    with pytest.raises(PlacementError, match=r"6 copies in layer 0, and 5 are allowed: 5 experts and 0 replicas"):
        problem.check(Plan(2, experts))


def test_objective_is_the_mean_of_the_workloads_or_the_worst():
    workloads, plan = [random_workload(seed) for seed in range(3)], Plan.of_gpus(2, np.array([[0, 0, 1, 1, 0]] * 3))
    topology = machine(500, 200)
    seconds = [judge(plan, workload, topology, STEP).step_s for workload in workloads]
    assert Problem(workloads, topology, STEP).objective(plan) == pytest.approx(np.mean(seconds))
    assert Problem(workloads, topology, STEP, worst_case=True).objective(plan) == max(seconds)


def test_gap_is_relative_to_the_bound():
    def gap(objective, bound):
        return Solution("s", Plan(1, (((0,),),)), objective, bound, "balance", 0.0, "feasible").gap

    assert gap(1.2, 1.0) == pytest.approx(0.2)
    assert gap(1.0, 1.0) == 0
    assert gap(1.0, 0.0) == math.inf
