"""The replay: two loops that agree, the live cache hit by hit, Belady against every choice, reference figures."""

import json
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.c_library import c_function
from moeflow.core import ExpertKey
from moeflow.errors import ConfigError
from moeflow.policy.cache import ExpertCache
from moeflow.replay import demand as module
from moeflow.replay.demand import REPLAY_POLICIES, replay, replay_trace, slots_of
from moeflow.replay.demand_loop import replay_loop
from moeflow.trace.format import DECODE, TraceFormat
from moeflow.trace.trace import RoutingTrace

# The table in the README of the test data: per layer (slots of each), then one pool for all layers.
REFERENCE = {
    (8, True): {"lru": 0.6348, "lfu": 0.6557, "belady": 0.7542},
    (16, True): {"lru": 0.8735, "lfu": 0.8838, "belady": 0.9247},
    (115, False): {"lru": 0.4171, "lfu": 0.4402, "belady": 0.6629},
    (192, False): {"lru": 0.5883, "lfu": 0.6270, "belady": 0.8064},
    (268, False): {"lru": 0.7443, "lfu": 0.7580, "belady": 0.8830},
    (345, False): {"lru": 0.8471, "lfu": 0.8490, "belady": 0.9264},
}


@pytest.fixture
def compiled():
    """The compiled loop: an installation without it runs none of the tests that compare."""
    loop = module._compiled_loop()
    if loop is None:
        pytest.skip("moeflow was installed without a C compiler")
    return loop


@pytest.fixture
def python_only(monkeypatch):
    """An installation without a compiler."""
    monkeypatch.setattr("moeflow.c_library.EXTENSION_SUFFIXES", [])
    c_function.cache_clear()
    yield
    monkeypatch.undo()
    c_function.cache_clear()


def random_routing(seed, num_tokens=60, num_layers=3, num_experts=8, top_k=2):
    """Return skewed routing: [N, L, K]."""
    rng = np.random.default_rng(seed)
    odds = rng.dirichlet(np.full(num_experts, 0.5), num_layers) + 0.01
    odds /= odds.sum(-1, keepdims=True)
    draw = [
        [rng.choice(num_experts, top_k, False, odds[layer]) for layer in range(num_layers)] for _ in range(num_tokens)
    ]
    return np.array(draw)


def write_trace(experts, sequence=None, phase=None, num_experts=8):
    """Return a trace in memory."""
    form = TraceFormat((num_experts,) * experts.shape[1], experts.shape[2], "test-model", has_weights=False)
    rows = np.zeros(len(experts), form.dtype)
    rows["experts"] = experts
    rows["sequence"] = 0 if sequence is None else sequence
    rows["phase"] = DECODE if phase is None else phase
    return RoutingTrace(form, rows)


def live_hits(experts, starts, num_slots, policy, num_experts):
    """Drive the live cache as the runtime does. Returns hits [L]."""
    hits = np.zeros(experts.shape[1], np.int64)
    for begin, end in pairwise(starts):
        live = ExpertCache(num_slots, policy, num_transient=experts.shape[2] + 1)
        if policy == "lfu":  # the replay's rule for ties, see replay_loop.SCORES; the counting is the live cache's

            def lowest_key_first(live):
                keys = [key or ExpertKey(0, 0) for key in live._key_of]
                return live.frequency + [1e-6 * (key.layer * num_experts + key.expert) for key in keys]

            live._victim_scores = lowest_key_first
        for row in experts[begin:end]:
            for layer, event in enumerate(row):
                keys = [ExpertKey(layer, int(expert)) for expert in sorted(event)]
                live.touch(keys)
                held = [key for key in keys if key in live]
                missed = [key for key in keys if key not in live]
                for key in held:
                    live.pin(key)
                for key in missed:
                    assert live.reserve(key) is not None
                    live.commit(key)
                for key in keys:
                    live.unpin(key)
                hits[layer] += len(held)
    return hits


def best_possible_hits(experts, num_slots):
    """Try every eviction of every miss, always taking in what is demanded. Returns the most hits."""
    events = [[(layer, int(e)) for e in event] for row in experts for layer, event in enumerate(row)]

    @cache
    def best(index, resident):
        if index == len(events):
            return 0
        demanded = frozenset(events[index])
        hits, kept = len(demanded & resident), demanded | resident
        too_many = max(0, len(kept) - num_slots)
        choices = [kept]
        for _ in range(too_many):
            choices = {choice - {key} for choice in choices for key in choice - demanded}
        return hits + max(best(index + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


@pytest.mark.slow
@pytest.mark.parametrize(("num_slots", "per_layer"), REFERENCE)
def test_reference_figures_are_reproduced(data_folder, num_slots, per_layer):
    folder = data_folder / "gpt_oss_20b"
    arrays = np.load(folder / "gpt_oss_20b_topk.npz")
    facts = json.loads((folder / "sequences.json").read_text())
    begins, lengths = arrays["seq_start"], arrays["seq_len"]
    chosen = [
        i for i, fact in enumerate(facts)
        if fact["finished"] and not fact["repetition"] and not fact["duplicate"] and lengths[i] >= 64
    ][:40]  # fmt: skip
    ids = arrays["expert_ids"]
    experts = np.concatenate([ids[begins[i] : begins[i] + lengths[i]] for i in chosen])
    starts = np.cumsum([0, *lengths[chosen]])
    assert len(experts) == 7694
    for policy, expected in REFERENCE[num_slots, per_layer].items():
        result = replay(experts, 32, starts, num_slots, policy, per_layer=per_layer)
        assert result.accesses == 7694 * 24 * 4
        assert result.hit_rate == pytest.approx(expected, abs=6e-5), policy


@pytest.mark.parametrize("policy", REPLAY_POLICIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_slots=st.integers(2, 24), warm=st.booleans())
def test_compiled_and_python_loops_agree(policy, seed, num_slots, warm):
    loop = module._compiled_loop()
    if loop is None:
        pytest.skip("moeflow was installed without a C compiler")
    experts = np.sort(random_routing(seed, 40)).astype(np.uint16)
    experts[seed % 40, seed % 3, -1] = 8  # stands for none
    starts = np.array([0, 9, 9, 40])
    options = {"warm": warm, "num_fixed": num_slots - 3, "seed": seed}
    theirs = loop(experts, 8, starts, num_slots, policy, **options)
    ours = replay_loop(experts, 8, starts, num_slots, policy, **options)
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "static"])
@pytest.mark.parametrize("num_slots", [2, 5, 9, 14, 23])
def test_policy_hits_what_the_live_cache_hits(policy, num_slots):
    for seed in range(3):
        experts = random_routing(seed)
        starts = np.array([0, 25, 60])
        result = replay(experts, 8, starts, num_slots, policy)
        expected = live_hits(experts, starts, num_slots, policy, 8)
        np.testing.assert_array_equal(result.layer_hits, expected)


@pytest.mark.parametrize("num_slots", [2, 3, 4])
def test_no_sequence_of_evictions_beats_belady(num_slots):
    for seed in range(12):
        experts = random_routing(seed, num_tokens=6, num_layers=2, num_experts=4)
        assert replay(experts, 4, [0, 6], num_slots, "belady").hits == best_possible_hits(experts, num_slots)


def test_belady_is_never_beaten_by_another_policy():
    experts = random_routing(1, 200)
    for num_slots in (4, 8, 16):
        best = replay(experts, 8, [0, 200], num_slots, "belady").hits
        assert all(replay(experts, 8, [0, 200], num_slots, policy).hits <= best for policy in REPLAY_POLICIES)


def test_what_one_event_demands_is_hit_only_if_it_was_there_before():
    experts = np.array([[[0, 1]], [[1, 0]], [[2, 1]]])
    assert replay(experts, 4, [0, 3], 2, "lru").hits == 3


def test_one_event_never_evicts_what_it_demands():
    # 0 is the least recent when 1 and 2 arrive with it: were it evicted, the next event would miss it.
    experts = np.array([[[0, 3, 4]], [[0, 1, 2]], [[0, 1, 2]]])
    for policy in REPLAY_POLICIES:
        assert replay(experts, 8, [0, 3], 3, policy).hits == 4, policy


def test_sequences_start_cold_unless_warm():
    experts = np.array([[[0, 1]], [[0, 1]]])
    assert replay(experts, 4, [0, 1, 2], 4, "lru").hits == 0
    assert replay(experts, 4, [0, 1, 2], 4, "lru", warm=True).hits == 2


def test_layers_of_their_own_share_no_slots():
    experts = random_routing(3)
    result = replay(experts, 8, [0, 60], 4, "lru", per_layer=True)
    alone = [replay(experts[:, [layer]], 8, [0, 60], 4, "lru").hits for layer in range(3)]
    assert result.layer_hits.tolist() == alone


def test_everything_resident_misses_only_first_uses():
    experts = random_routing(4)
    first_uses = sum(len(np.unique(experts[:, layer])) for layer in range(3))
    for policy in REPLAY_POLICIES:
        result = replay(experts, 8, [0, 60], 24, policy)
        assert result.accesses - result.hits == first_uses, policy


def test_popularity_keeps_what_the_whole_trace_demands_most():
    experts = np.array([[[0]], [[1]], [[2]], [[0]], [[3]], [[0]]])
    assert replay(experts, 4, [0, 6], 2, "popularity").hits == 2


def test_random_policy_repeats_with_its_seed():
    experts, starts = random_routing(5, 200), [0, 200]
    hits = [replay(experts, 8, starts, 6, "random", seed=seed).hits for seed in (1, 1, 2)]
    assert hits[0] == hits[1] != hits[2]


def test_order_of_ranks_and_padding_change_nothing():
    experts = random_routing(6)
    padded = np.concatenate([experts[..., ::-1], np.full((60, 3, 1), 255), experts[..., :1]], -1)
    for policy in ("lru", "lfu", "lfru", "belady"):
        plain, other = (replay(e, 8, [0, 60], 7, policy) for e in (experts, padded))
        assert (plain.hits, plain.accesses) == (other.hits, other.accesses)


def test_eight_bit_traces_of_256_experts_are_read():
    experts = np.array([[[255, 0]], [[0, 255]]], np.uint8)
    assert replay(experts, 256, [0, 2], 2, "lru").hits == 2


def test_without_a_compiler_one_warning_and_the_same_hits(compiled, request, caplog):
    experts = random_routing(7)
    expected = [replay(experts, 8, [0, 60], 7, policy).hits for policy in REPLAY_POLICIES]
    request.getfixturevalue("python_only")
    assert [replay(experts, 8, [0, 60], 7, policy).hits for policy in REPLAY_POLICIES] == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C compiler" in caplog.text


def test_residency_is_rounded_down_to_slots():
    assert [slots_of(r, (32,) * 24, 4) for r in (15, 25, 35, 45, 100)] == [115, 192, 268, 345, 768]
    assert slots_of(32.3, (1000,), 4) == 323
    assert slots_of(25, (32,) * 24, 4, per_layer=True) == 8


def test_trace_rows_come_by_policy_and_residency():
    rows = replay_trace(write_trace(random_routing(8)), [25, 50], ["lru", "belady"])
    assert [(row["policy"], row["residency"], row["slots"]) for row in rows] == [
        ("lru", 25, 6), ("lru", 50, 12), ("belady", 25, 6), ("belady", 50, 12),
    ]  # fmt: skip
    assert list(rows[0]) == ["policy", "residency", "slots", "hit_rate", "hits", "accesses"]
    assert all(row["hit_rate"] == row["hits"] / row["accesses"] and row["accesses"] == 360 for row in rows)


def test_mixed_sequences_are_replayed_one_after_another():
    experts = random_routing(9, 40)
    apart = replay(np.concatenate([experts[::2], experts[1::2]]), 8, [0, 20, 40], 7, "lru").hits
    mixed = replay_trace(write_trace(experts, sequence=np.arange(40) % 2), [30], ["lru"])
    assert mixed[0]["hits"] == apart


def test_prompts_count_only_when_asked():
    phase = np.full(60, DECODE)
    phase[:20] = 0
    trace = write_trace(random_routing(10), phase=phase)
    assert replay_trace(trace, [50], ["lru"])[0]["accesses"] == 240
    assert replay_trace(trace, [50], ["lru"], phase="all")[0]["accesses"] == 360


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residencies": [5]}, r"5 % is 1 slots.*2 experts.*minimum is 8\.34 %"),
        ({"residencies": [10], "per_layer": True}, r"0 slots a layer.*minimum is 25 %"),
        ({"residencies": [0]}, "above 0"),
        ({"residencies": [101]}, "at most 100"),
        ({"policies": ["mru"]}, "'mru' is unknown. Allowed: lru, "),
        ({"phase": "train"}, "'train' is unknown"),
    ],
)
def test_bad_options_are_named(options, words):
    arguments = {"residencies": [50], "policies": ["lru"], **options}
    with pytest.raises(ConfigError, match=words):
        replay_trace(write_trace(random_routing(0)), **arguments)


def test_minimum_residency_that_is_named_is_enough():
    for top_k, layers in product((1, 2, 3, 4), (1, 3, 7, 24, 61)):
        with pytest.raises(ConfigError) as error:
            slots_of(1e-6, (8,) * layers, top_k)
        minimum = float(str(error.value).split("minimum is ")[1].split(" ")[0])
        assert slots_of(minimum, (8,) * layers, top_k) == top_k


def test_too_few_slots_and_empty_traces_are_refused():
    experts = random_routing(0)
    with pytest.raises(ConfigError, match=r"1 slots are fewer than the 2 experts.*minimum is 2"):
        replay(experts, 8, [0, 60], 1, "lru")
    with pytest.raises(ConfigError, match="empty"):
        replay(experts[:0], 8, [0], 4, "lru")
    with pytest.raises(ConfigError, match="empty"):
        replay(experts, 8, [7, 7], 4, "lru")
    with pytest.raises(ConfigError, match="demands no expert"):
        replay(np.full((3, 2, 2), 255), 8, [0, 3], 4, "lru")
    with pytest.raises(ConfigError, match="no decode rows"):
        replay_trace(write_trace(experts, phase=np.zeros(60)), [50], ["lru"])
    with pytest.raises(ConfigError, match="rising order"):
        replay(experts, 8, [0, 61], 4, "lru")


@pytest.mark.parametrize("policy", REPLAY_POLICIES)
def test_more_slots_than_experts_are_as_many_as_experts(policy):
    experts, every = random_routing(0), 8 * random_routing(0).shape[1]
    for num_slots in (2**31, 2**32 + 3, 2**70):
        found, enough = (replay(experts, 8, [0, 60], slots, policy) for slots in (num_slots, every))
        assert found.layer_hits.tolist() == enough.layer_hits.tolist()


def test_routes_that_the_loop_cannot_count_are_refused():
    experts = random_routing(0)
    for num_experts in (-1, 0, 2**16):
        with pytest.raises(ConfigError, match="Allowed: 1 to 65535"):
            replay(experts, num_experts, [0, 60], 4, "lru")
    for routes in (experts[0], experts * 1.5):
        with pytest.raises(ConfigError, match="whole numbers"):
            replay(routes, 8, [0, 60], 4, "lru")
