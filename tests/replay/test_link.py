"""Replay with a link: by hand, against the demand-only replay, and with predictors that know everything or lie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_predictor import Foretold, random_routes
from helpers.link_traces import LINK, E, K, L, trace_of
from moeflow.core import ExpertKey
from moeflow.errors import BudgetError, ConfigError
from moeflow.policy.cache import ExpertCache
from moeflow.policy.prediction_switch import PredictionSwitch
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger
from moeflow.predictors.odds import multi_hot
from moeflow.replay.clairvoyant import Clairvoyant
from moeflow.replay.demand import replay
from moeflow.replay.link import LinkModel, LinkReplay, replay_link


def lies(routes, num_experts=E):
    """Say of every expert that is demanded that it is not, and the other way round."""
    return 1 - multi_hot(routes, num_experts)


class Timeline:
    """A replay of one-expert layers whose clock is looked at; every event is checked."""

    def __init__(self, now, num_slots, link=LINK, later=None, **options):
        self.cache = ExpertCache(num_slots, "forecast")
        self.ledger = PrefetchLedger(np.asarray(now).shape[1], expert_bytes=link.expert_bytes)
        prefetcher = Prefetcher(Foretold(now, later), self.cache, self.ledger, **options)
        prefetcher.begin(1)
        self.replay = LinkReplay(link, self.cache, prefetcher)

    def step(self):
        self.replay.begin_step(0)
        self.cache.check_integrity()

    def layer(self, layer, *experts):
        self.replay.layer(layer, np.array(experts), None, None)
        self.cache.check_integrity()
        return self.replay.now_s


def foretell(num_layers, *keys):
    now = np.zeros((1, num_layers, E))
    for layer, expert, probability in keys:
        now[0, layer, expert] = probability
    return now


def test_a_miss_waits_for_its_copy_and_a_prefetch_for_nobody():
    timeline = Timeline(foretell(2, (1, 5, 1.0)), 4)
    timeline.step()  # the copy of (1, 5) begins at 0 and ends at 2
    assert timeline.layer(0, 3) == 2 + 2 + 3  # a miss behind it: arrives at 4, computed by 7
    assert timeline.layer(1, 5) == 7 + 3  # there already
    assert (timeline.replay.hits, timeline.replay.late, timeline.replay.misses) == (1, 0, 1)


def test_a_copy_in_flight_is_waited_for_and_not_begun_again():
    timeline = Timeline(foretell(1, (0, 5, 1.0)), 4)
    timeline.step()
    assert timeline.layer(0, 5) == 2 + 3
    assert (timeline.replay.hits, timeline.replay.late, timeline.replay.misses) == (0, 1, 0)
    assert timeline.ledger.as_dict()["late"] == 1


def test_copies_run_one_after_another_while_layers_compute():
    timeline = Timeline(foretell(4, (1, 0, 1.0), (2, 0, 1.0), (3, 0, 1.0)), 8)
    timeline.step()  # arrivals at 2, 4 and 6
    assert timeline.layer(0, 7) == 2 + 2 + 3  # jumps the two in the queue: 2 to 4; they arrive at 6 and 8
    assert timeline.layer(1, 0) == 10
    assert timeline.layer(2, 0) == 13
    assert timeline.layer(3, 0) == 16
    assert timeline.replay.hits == 3


def test_a_demanded_prefetch_jumps_the_queue():
    timeline = Timeline(foretell(2, (0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7)), 8)
    timeline.step()  # 0 copies from 0 to 2, 1 and 2 wait
    assert timeline.layer(0, 2) == 2 + 2 + 3  # and not 6 + 3


def test_a_prefetch_in_the_queue_that_comes_too_late_is_taken_back():
    link = LINK._replace(in_flight=2)
    timeline = Timeline(foretell(3, (0, 0, 0.9), (0, 1, 0.8)), 2, link, window=1)
    timeline.step()
    assert len(timeline.cache.slots) == 2
    timeline.layer(0, 0)
    assert ExpertKey(0, 1) not in timeline.cache.slots
    assert len(timeline.cache) == 1  # its slot is free again
    assert timeline.ledger.as_dict()["dropped"] == 1


def test_prefetches_under_way_are_limited():
    timeline = Timeline(foretell(4, *[(layer, e, 1.0) for layer in range(4) for e in range(4)]), 16)
    timeline.step()
    assert len(timeline.cache.slots) == LINK.in_flight


def test_a_layer_whose_experts_just_fit_is_served_whatever_was_prefetched():
    routes = random_routes(20, L, E, K, seed=3)
    for seed in range(5):
        told = np.random.default_rng(seed).random((20, L, E))
        row = replay_link(trace_of(routes), K, LINK, policy="forecast", predictor=Foretold(told))
        assert row["hits"] + row["late"] + row["misses"] == row["accesses"] == routes.size


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(K, 20), st.integers(0, 6), st.sampled_from(["forecast", "lru", "lfru"]))
def test_random_predictions_keep_the_invariants(seed, num_slots, in_flight, policy):
    """The cache asserts that no expert gets a second slot; every prefetch has to end in one place."""
    rng = np.random.default_rng(seed)
    routes = random_routes(6, L, E, K, seed, stay=rng.random())
    cache, ledger = ExpertCache(num_slots, policy), PrefetchLedger(L, expert_bytes=2)
    predictor = Foretold(rng.random((6, L, E)) ** 2, rng.random((6, 3, L, E)) ** 2)
    prefetcher = Prefetcher(predictor, cache, ledger, window=int(rng.integers(1, L + 1)), min_probability=0.2)
    prefetcher.begin(1)
    link = LinkModel(1, 1.0, float(rng.uniform(0.1, 3)), in_flight)
    run, before_s = LinkReplay(link, cache, prefetcher), 0.0
    for number, row in enumerate(routes):
        run.begin_step(number)
        for layer, experts in enumerate(row):
            run.layer(layer, experts, None, None)
            cache.check_integrity()
            assert all(ExpertKey(layer, expert) in cache for expert in experts.tolist())
            assert run.now_s >= before_s + link.layer_s
            before_s = run.now_s
            total = ledger.as_dict()
            assert sum(total[name] for name in ("in_time", "late", "wasted", "dropped")) <= total["issued"]
    assert run.hits + run.late + run.misses == routes.size


@pytest.mark.parametrize("policy", ["lru", "lfru"])
def test_on_demand_time_is_compute_and_a_copy_a_miss(policy):
    """Nothing is copied while a layer computes: that is how the rows of demand-only policies are found."""
    routes = random_routes(60, L, E, K, seed=1)
    row = replay_link(trace_of(routes), 12, LINK, policy=policy)
    assert row["misses"] > 0
    seconds = 60 * L * LINK.layer_s + row["misses"] * LINK.copy_s
    assert row["tokens_per_s"] == pytest.approx(60 / seconds)
    assert row["share"] == pytest.approx(60 * L * LINK.layer_s / seconds)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(K, 24))
def test_with_certain_predictions_the_cache_evicts_as_belady_does(seed, num_slots):
    routes = random_routes(15, L, E, K, seed, stay=0.5)
    predictor = Clairvoyant([routes], E, num_steps=15)
    no_prefetch = LINK._replace(in_flight=0)
    row = replay_link(trace_of(routes), num_slots, no_prefetch, policy="forecast", predictor=predictor, num_steps=15)
    belady = replay(routes, E, np.array([0, len(routes)]), num_slots, "belady")
    assert (row["hits"], row["late"]) == (belady.hits, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2 * K, 24))
def test_who_knows_the_future_is_at_least_as_fast_as_demand(seed, num_slots):
    routes = random_routes(30, L, E, K, seed)
    trace = trace_of(routes)
    rows = [replay_link(trace, num_slots, LINK, policy=policy) for policy in ("lru", "lfru")]
    best = replay_link(trace, num_slots, LINK, policy="forecast", predictor=Clairvoyant([routes], E), num_steps=30)
    assert best["share"] >= max(row["share"] for row in rows)
    assert best["hits"] + best["late"] >= max(row["hits"] for row in rows)
    assert best["prefetch"]["mispredicted"] == 0


def test_lies_are_switched_off_by_layer_and_distance():
    """Every expert that will not be needed is foretold for certain; what is left of it is a few per cent."""
    routes = random_routes(1000, L, E, K, seed=2)
    trace = trace_of(routes)
    demand = replay_link(trace, 12, LINK, policy="lfru")
    lied_to = replay_link(trace, 12, LINK, policy="lfru", predictor=Foretold(lies(routes)))
    account = lied_to["prefetch"]
    assert account["losing"] > L * L / 2  # of L layers and L distances
    assert account["issued"] > 0
    assert account["in_time"] < 0.2 * account["issued"]
    assert lied_to["share"] > 0.96 * demand["share"]


def test_lies_that_govern_eviction_are_switched_off_by_the_clock():
    routes = random_routes(1000, L, E, K, seed=2)
    trace = trace_of(routes)
    demand = replay_link(trace, 12, LINK, policy="lfru")
    shares = [
        replay_link(trace, 12, LINK, policy="forecast", predictor=Foretold(lies(routes)), switch=switch)["share"]
        for switch in (None, PredictionSwitch())
    ]
    assert shares[0] < 0.9 * demand["share"]
    assert shares[1] > 0.96 * demand["share"]


def test_the_clock_leaves_good_prediction_on():
    routes = random_routes(600, L, E, K, seed=2)
    rows = [
        replay_link(
            trace_of(routes), 12, LINK, policy="forecast", predictor=Foretold(multi_hot(routes, E)), switch=switch
        )
        for switch in (None, PredictionSwitch())
    ]
    assert rows[1]["share"] > 0.96 * rows[0]["share"]


def test_sequences_start_cold_and_alone():
    one, other = random_routes(20, L, E, K, 4), random_routes(20, L, E, K, 5)
    both = replay_link(trace_of(one, other), 10, LINK, policy="lru")
    apart = [replay_link(trace_of(one, other), 10, LINK, policy="lru", sequences=[place]) for place in (0, 1)]
    assert both["hits"] == sum(row["hits"] for row in apart)
    assert 40 / both["tokens_per_s"] == pytest.approx(sum(20 / row["tokens_per_s"] for row in apart))


def test_a_prompt_is_shown_to_the_predictor_and_costs_nothing():
    class Listens(Foretold):
        def prefill(self, token_ids, experts, weights):
            self.heard = token_ids.shape, experts.shape, weights

    routes, predictor = random_routes(20, L, E, K, 4), Listens(np.zeros((20, L, E)))
    row = replay_link(trace_of(routes, prompt=5), 10, LINK, predictor=predictor)
    assert (row["tokens"], row["accesses"]) == (15, 15 * L * K)
    assert predictor.heard == ((1, 5), (1, 5, L, K), None)


def test_too_few_slots_and_nothing_to_decode_are_refused():
    routes = random_routes(5, L, E, K, 4)
    with pytest.raises(BudgetError, match="1 slots are fewer than the 2 experts"):
        replay_link(trace_of(routes), 1, LINK)
    with pytest.raises(ConfigError, match="no decode rows"):
        replay_link(trace_of(routes, prompt=5), 10, LINK)
