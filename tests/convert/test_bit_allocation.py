"""Widths chosen by a program: brute force is the oracle, the bound is checked apart from the solver."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.convert.bit_allocation import allocate, dual_bound, relative_gap
from moeflow.errors import BudgetError, ConfigError

BYTES = np.array([10, 21, 30, 40, 80])


def by_brute_force(costs, num_bytes, budget):
    rows, sizes = costs.reshape(-1, costs.shape[-1]), num_bytes.reshape(-1, costs.shape[-1])
    experts = range(len(rows))
    return min(
        sum(rows[e, j] for e, j in zip(experts, choice, strict=True))
        for choice in itertools.product(range(costs.shape[-1]), repeat=len(rows))
        if sum(sizes[e, j] for e, j in zip(experts, choice, strict=True)) <= budget
    )


@st.composite
def programs(draw):
    layers, experts, widths = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    count = layers * experts * widths
    # Few distinct numbers: ties, dominated widths and costs of zero all occur.
    costs = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    costs, sizes = (np.array(values, float).reshape(layers, experts, widths) for values in (costs, sizes))
    least, most = int(sizes.min(-1).sum()), int(sizes.max(-1).sum())
    return costs, sizes, draw(st.integers(least, most + 2))


@settings(max_examples=40, deadline=None)
@given(programs())
def test_choice_is_the_brute_force_optimum_and_its_bound_holds(program):
    costs, sizes, budget = program
    best = by_brute_force(costs, sizes, budget)
    found = allocate(costs, sizes, budget, gap=0)
    assert found.cost == pytest.approx(best)
    assert found.bound <= best + 1e-9
    assert found.num_bytes == np.take_along_axis(sizes, found.choice[..., None], -1).sum() <= budget
    assert found.cost == pytest.approx(np.take_along_axis(costs, found.choice[..., None], -1).sum())


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_the_whole_program_gives_the_same_optimum(solver):
    costs = np.random.default_rng(1).random((2, 3, 5)) * 4.0 ** -np.arange(5)
    found = allocate(costs, BYTES, 200, gap=0, solver=solver)
    assert found.solver == solver
    assert found.cost == pytest.approx(by_brute_force(costs, np.broadcast_to(BYTES, costs.shape), 200))


def test_without_a_solver_the_rounding_stands_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if not installed
    costs = np.random.default_rng(1).random((2, 3, 5)) * 4.0 ** -np.arange(5)
    found = allocate(costs, BYTES, 200, gap=0, solver="highs")
    assert found.solver == "hull"
    assert found.bound <= found.cost
    assert "pip install highspy" in caplog.text


@pytest.mark.parametrize("price", [0.0, 1e-4, 1e-2, 1.0])
def test_any_price_of_a_byte_bounds_every_allocation(price):
    costs = np.random.default_rng(2).random((2, 2, 4))
    sizes = np.broadcast_to(BYTES[:4], costs.shape)
    assert dual_bound(costs, sizes, 90, price) <= by_brute_force(costs, sizes, 90)


def test_gap_at_the_size_of_a_large_model_is_proven():
    rng = np.random.default_rng(3)
    costs = rng.gamma(0.5, size=(58, 256, 1)) * np.exp(rng.normal(size=(58, 256, 5))) * 4.0 ** -np.arange(1, 6)
    found = allocate(costs, BYTES, 58 * 256 * 25, gap=0.01)
    assert found.gap <= 0.01
    assert relative_gap(found.cost, found.bound) == found.gap
    # The bound again, by a search over prices instead of the hull.
    prices = np.geomspace(1e-6, 1, 200)
    assert max(dual_bound(costs, BYTES, 58 * 256 * 25, price) for price in prices) <= found.bound * (1 + 1e-9)


def test_experts_of_equal_cost_share_a_budget_that_only_some_can_use():
    found = allocate(np.tile([4.0, 1.0], (1, 10, 1)), [1, 3], 10 + 2 * 7)
    assert found.choice.sum() == 7
    assert found.cost == found.bound


def test_budget_for_everything_gives_every_expert_its_best_width():
    costs = np.random.default_rng(4).random((3, 4, 5))
    found = allocate(costs, BYTES, 12 * 80)
    assert (found.choice == costs.argmin(-1)).all()
    assert found.gap == 0


def test_budget_below_the_smallest_allocation_names_least_and_most():
    with pytest.raises(BudgetError, match="take 120 bytes, at their largest 960"):
        allocate(np.ones((3, 4, 5)), BYTES, 119)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_cost_that_is_no_cost_is_refused_by_its_place(bad):
    costs = np.ones((2, 3, 5))
    costs[1, 2, 4] = bad
    with pytest.raises(ConfigError, match=r"layer 1, expert 2 costs .* at width number 4"):
        allocate(costs, BYTES, 1000)


@pytest.mark.parametrize("shape", [(0, 4, 5), (4, 5)])
def test_costs_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match="costs have shape"):
        allocate(np.ones(shape), BYTES, 1000)


@pytest.mark.parametrize("sizes", [[1, 2], [1, 2, 3, 4, -5], [1, 2, 3, 4, 5.5]])
def test_bytes_that_do_not_fit_the_costs_are_refused(sizes):
    with pytest.raises(ConfigError, match="bytes have shape"):
        allocate(np.ones((2, 3, 5)), sizes, 1000)


def test_unknown_solver_is_refused():
    with pytest.raises(ConfigError, match="Allowed: auto, highs, cbc"):
        allocate(np.ones((2, 3, 5)), BYTES, 1000, solver="simplex")
