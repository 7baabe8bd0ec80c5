"""Tiers of memory: brute force is the oracle, sorting where sizes are equal."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.errors import PlacementError
from moeflow.placement.tier_program import dual_bound, fill_in_order, improve_tiers, total
from moeflow.placement.tiers import TIERS, choose_tiers, judge_tiers, static_or_dynamic
from moeflow.placement.workload import Workload

RATES = {"host_bytes_per_s": 10.0, "disk_bytes_per_s": 2.0}
PER_BYTE = np.array([0, 1 / 10, 1 / 10 + 1 / 2])


def by_brute_force(uses, sizes, budgets, per_byte):
    best = math.inf
    for tier in itertools.product(range(len(per_byte)), repeat=len(uses)):
        tier = np.array(tier)
        if all(sizes[tier == number].sum() <= budget for number, budget in enumerate(budgets)):
            best = min(best, float((uses * sizes * per_byte[tier]).sum()))
    return best


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["highs", "cbc"]))
def test_choice_is_the_brute_force_optimum_and_its_bound_holds(seed, solver):
    rng = np.random.default_rng(seed)
    shape = (2, int(rng.integers(1, 4)))
    sizes = rng.integers(1, 7, shape if rng.random() < 0.6 else (2, 1)) * np.ones(shape)
    workload = Workload("w", rng.gamma(0.5, size=shape) + 0.01, top_k=1)
    gpu_bytes, host_bytes = (float(rng.integers(0, sizes.sum() + 2)) for _ in range(2))
    host_bytes = host_bytes if rng.random() < 0.7 else math.inf
    plan = choose_tiers(workload, sizes, gpu_bytes=gpu_bytes, host_bytes=host_bytes, solver=solver, **RATES)
    uses = workload.shares().ravel()
    best = by_brute_force(uses, sizes.ravel(), (gpu_bytes, host_bytes), PER_BYTE)
    assert plan.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= plan.s_per_token <= best * (1 + 2e-4)
    assert plan.s_per_token == pytest.approx(float((uses * sizes.ravel() * PER_BYTE[plan.tier.ravel()]).sum()))
    assert sizes[plan.tier == 0].sum() <= gpu_bytes
    assert sizes[plan.tier == 1].sum() <= host_bytes


def test_equal_sizes_are_sorted_by_use_over_all_layers():
    workload = Workload("w", [[8, 1, 1], [4, 3, 3]], top_k=2)
    plan = choose_tiers(workload, 10, gpu_bytes=25, host_bytes=29, **RATES)
    assert plan.tier.tolist() == [[0, 2, 2], [0, 1, 1]]
    assert [TIERS[number] for number in plan.tier[0]] == ["gpu", "disk", "disk"]
    assert plan.hit_rate == pytest.approx((0.8 + 0.4) / 2)
    assert plan.rates == pytest.approx((0.6, 0.3, 0.1))
    assert plan.s_per_token == pytest.approx(2 * (0.6 * 1.0 + 0.2 * 6.0))
    assert plan.status == "optimal"
    assert plan.gap == 0


def test_a_large_expert_gives_way_to_two_small_ones_that_are_used_less_each():
    # Filled by use, the GPU takes the first and has no room for others.
    workload = Workload("w", [[5, 4, 4]], top_k=1)
    plan = choose_tiers(workload, [[3, 2, 2]], gpu_bytes=4, **RATES)
    assert plan.tier.tolist() == [[1, 0, 0]]
    assert plan.status == "optimal"


def test_judged_on_another_workload_only_rates_and_waiting_change_and_no_bound_holds():
    chosen_by = Workload("w", [[6, 2, 2]], top_k=1)
    plan = choose_tiers(chosen_by, 10, gpu_bytes=10, host_bytes=10, **RATES)
    again = judge_tiers(plan, chosen_by, 10, top_k=1, **RATES)
    assert (again.rates, again.s_per_token, again.bound) == (plan.rates, plan.s_per_token, 0)
    other = judge_tiers(plan, Workload("o", [[1, 3, 6]]), 10, top_k=1, **RATES)
    assert (other.tier == plan.tier).all()
    assert other.rates == pytest.approx((0.1, 0.3, 0.6))
    assert other.s_per_token == pytest.approx(0.3 * 1 + 0.6 * 6)


def test_what_fits_whole_waits_for_nothing():
    plan = choose_tiers(Workload("w", [[5, 4]], top_k=1), [[3, 2]], gpu_bytes=5, **RATES)
    assert (plan.hit_rate, plan.s_per_token, plan.gap, plan.status) == (1, 0, 0, "optimal")
    with pytest.raises(PlacementError, match="nothing to move"):
        static_or_dynamic(plan, {"lru": 0.5})


def test_without_a_disk_everything_finds_a_place_though_filling_by_use_does_not():
    # By use: 3 to the GPU, 2 to the host, and the last 2 fits neither. Both 2 on the GPU leave the host for the 3.
    workload = Workload("w", [[9, 5, 5]], top_k=1)
    plan = choose_tiers(workload, [[3, 2, 2]], gpu_bytes=4, host_bytes=3, disk_bytes_per_s=None)
    assert plan.tier.tolist() == [[1, 0, 0]]
    with pytest.raises(PlacementError, match="Give the disk's rate"):
        choose_tiers(workload, [[3, 2, 2]], gpu_bytes=3.5, host_bytes=3.5, disk_bytes_per_s=None)
    with pytest.raises(PlacementError, match="Give the disk's rate"):
        choose_tiers(workload, 2, gpu_bytes=2, host_bytes=2, disk_bytes_per_s=None)


@pytest.mark.parametrize("prices", [(0.0, 0.0), (1e-3, 0.0), (0.01, 1e-3), (1.0, 0.5)])
def test_any_price_of_a_byte_bounds_every_choice(prices):
    rng = np.random.default_rng(0)
    uses, sizes = rng.random(6), rng.integers(1, 9, 6).astype(float)
    costs = uses[:, None] * sizes[:, None] * PER_BYTE
    assert dual_bound(sizes, costs, (9.0, 12.0), prices) <= by_brute_force(uses, sizes, (9.0, 12.0), PER_BYTE)


def test_no_time_leaves_the_start_and_a_bound():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 99, 40).astype(float)
    costs = (rng.random(40) * sizes)[:, None] * PER_BYTE
    start = fill_in_order(sizes, (300.0, 400.0), np.arange(40))
    tier, bound, _ = improve_tiers(sizes, costs, (300.0, 400.0), start, time_limit_s=0.0)
    assert bound <= total(costs, tier) <= total(costs, start)


def test_advice_names_the_cache_that_waits_least_and_what_it_saves():
    plan = choose_tiers(Workload("w", [[6, 2, 2]], top_k=1), 10, gpu_bytes=10, host_bytes=10, **RATES)
    assert plan.s_per_token == pytest.approx(0.2 * 1 + 0.2 * 6)
    advice = static_or_dynamic(plan, {"lru": 0.5, "lfru": 0.8})
    assert advice.best == "lfru"
    assert advice.s_per_token == pytest.approx({"static": 1.4, "lru": 0.5 * 3.5, "lfru": 0.2 * 3.5})
    assert advice.saved_s_per_token == pytest.approx(0.7)
    worse = static_or_dynamic(plan, {"lru": 0.5})
    assert (worse.best, worse.saved_s_per_token) == ("static", pytest.approx(-0.35))
    assert static_or_dynamic(plan, {"lru": plan.hit_rate}).best == "static"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu_bytes": -1}, "gpu_bytes is -1"),
        ({"gpu_bytes": math.nan}, "gpu_bytes is nan"),
        ({"host_bytes": -1}, "host_bytes"),
        ({"host_bytes_per_s": 0}, "host_bytes_per_s is 0. It must be above 0"),
        ({"disk_bytes_per_s": 0}, "disk_bytes_per_s"),
        ({"expert_bytes": 0}, "above 0 and finite"),
        ({"expert_bytes": [1, 2, 3]}, r"\[2, 1\] or \[2, 2\]"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 3}, "top_k is 3, and layers of w have 2 experts"),
        ({"top_k": None}, "give top_k"),
    ],
)
def test_sizes_budgets_and_rates_that_cannot_be_are_refused(change, says):
    options = {"expert_bytes": 10, "gpu_bytes": 10, "top_k": 1, **change}
    with pytest.raises(PlacementError, match=says):
        choose_tiers(Workload("w", [[1, 2], [3, 4]]), options.pop("expert_bytes"), **options)


@pytest.mark.parametrize("rates", [{}, {"lru": 1.2}, {"lru": math.nan}])
def test_hit_rates_that_cannot_be_are_refused(rates):
    plan = choose_tiers(Workload("w", [[6, 2, 2]], top_k=1), 10, gpu_bytes=10, **RATES)
    with pytest.raises(PlacementError, match="cache"):
        static_or_dynamic(plan, rates)
