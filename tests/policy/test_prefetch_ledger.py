"""The account of prefetch: every prefetch ends in one place, and what keeps losing is switched off for a while."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.core import ExpertKey
from moeflow.policy.demand import Demand
from moeflow.policy.prefetch_ledger import PrefetchLedger

L, D = 2, 3
KEY, OTHER = ExpertKey(0, 0), ExpertKey(1, 5)


def ledger(**options):
    return PrefetchLedger(L, D, expert_bytes=100, **options)


def demand(account, layer=0, resident=(), in_flight=(), absent=(), copy_s=1.0, others=()):
    account.record_demand(Demand(layer, list(resident), list(in_flight), list(absent), copy_s, list(others)))


def test_in_time_late_and_mispredicted_are_told_apart():
    account = ledger()
    for expert in range(3):
        account.start(ExpertKey(0, expert), 1, [])
    demand(account, resident=[ExpertKey(0, 0)], in_flight=[ExpertKey(0, 1)])
    total = account.as_dict()
    assert [total[name] for name in ("issued", "in_time", "late", "mispredicted", "wasted")] == [3, 1, 1, 1, 0]
    assert (total["precision"], total["timeliness"], total["recall_of_misses"]) == (2 / 3, 1 / 2, 1)


def test_saved_is_the_copy_that_demand_would_have_waited_for():
    account = ledger()
    account.start(KEY, 1, [])
    demand(account, resident=[KEY], copy_s=0.5)
    account.start(KEY, 1, [])
    demand(account, in_flight=[KEY], copy_s=0.5)
    assert account.as_dict()["saved_s"] == account.net_s == 0.5 + 0.25


def test_a_demand_that_misses_whom_a_prefetch_evicted_costs_a_copy():
    account = ledger()
    account.start(KEY, 1, evicted=[OTHER])
    demand(account, layer=1, absent=[OTHER])
    demand(account, layer=1, absent=[OTHER])  # the second time no prefetch is to blame
    assert account.as_dict()["cost_s"] == 1.0
    assert account.as_dict()["by_distance"][0]["cost_s"] == 1.0


def test_a_demanded_copy_beside_an_unwanted_one_costs_half():
    account = ledger()
    account.start(OTHER, 2, [])
    demand(account, absent=[KEY], others=[OTHER])
    demand(account, resident=[KEY], others=[OTHER])  # no layer waits: no harm
    assert account.as_dict()["by_distance"][1]["cost_s"] == 0.5


def test_wasted_bytes_are_counted_once():
    account = ledger()
    account.start(KEY, 1, [])
    demand(account)  # mispredicted
    for _ in range(3):
        account.evict(KEY)
    assert account.as_dict()["wasted_bytes"] == 100


def test_what_was_used_is_not_wasted_when_it_is_evicted():
    account = ledger()
    account.start(KEY, 1, [])
    demand(account, resident=[KEY])
    account.evict(KEY)
    assert account.as_dict()["wasted_bytes"] == 0


def test_a_mispredicted_expert_may_still_be_used_later():
    account = ledger()
    account.start(KEY, 1, [])
    demand(account)
    demand(account, resident=[KEY])
    total = account.as_dict()
    assert [total[name] for name in ("mispredicted", "in_time", "wasted")] == [1, 1, 0]


def test_distances_beyond_the_last_count_as_the_last():
    account = ledger()
    account.start(KEY, 40, [])
    assert [row["issued"] for row in account.as_dict()["by_distance"]] == [0, 0, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("sderx"), st.integers(0, L - 1), st.integers(0, 3), st.integers(1, 5))))
def test_every_prefetch_ends_in_one_place(events):
    """Issued is in time, late, wasted, dropped, or still there: the pool of those is modelled by a set."""
    account, there = ledger(), set()
    for event, layer, expert, distance in events:
        key = ExpertKey(layer, expert)
        if event == "s" and key not in there:
            evicted = next(iter(there - {key}), None) if distance == 5 else None
            account.start(key, distance, [evicted] if evicted else [])
            there = (there - {evicted}) | {key}
        elif event in "de":
            (account.drop if event == "d" else account.evict)(key)
            there.discard(key)
        elif event == "r":
            demand(account, layer, resident=[key] if distance < 3 else [], in_flight=[key] if distance >= 3 else [])
            there.discard(key)
        elif event == "x":
            demand(account, layer)
        total = account.as_dict()
        ended = sum(total[name] for name in ("in_time", "late", "wasted", "dropped"))
        assert total["issued"] == ended + len(there)
        assert total["mispredicted"] <= total["issued"]
        for name in ("issued", "in_time", "late", "mispredicted", "wasted", "dropped"):
            assert total[name] == sum(row[name] for row in total["by_distance"])


def lose(account, times, distance=1):
    for _ in range(times):
        account.start(KEY, distance, evicted=[OTHER])
        demand(account, layer=1, absent=[OTHER])
        demand(account)
        account.evict(KEY)


def test_a_losing_layer_and_distance_is_switched_off_alone_and_tried_again():
    account = ledger()
    lose(account, 2)
    account.decay()
    assert account.allowed(0, 1)  # too early to say
    lose(account, 20)
    account.decay()
    assert not account.allowed(0, 1)
    assert account.as_dict()["losing"] == 1
    assert account.allowed(0, 2)
    assert account.allowed(1, 1)
    first = steps_until_allowed(account)
    lose(account, 20)
    account.decay()
    assert steps_until_allowed(account) > first  # ever less often


def steps_until_allowed(account):
    for steps in range(1000):
        if account.allowed(0, 1):
            return steps
        account.decay()
    raise AssertionError("never tried again")


def test_what_saves_as_much_as_it_costs_stays_on():
    account = ledger()
    for _ in range(50):
        lose(account, 1)
        account.start(KEY, 1, [])
        demand(account, resident=[KEY])
        account.evict(KEY)
        account.decay()
        assert account.allowed(0, 1)


def test_counting_anew_forgets_no_prefetch_that_is_under_way():
    account = ledger()
    account.start(KEY, 1, [])
    account.reset()
    demand(account, resident=[KEY])
    assert account.as_dict()["in_time"] == 1


def test_after_everything_was_evicted_nothing_is_pending():
    account = ledger()
    account.start(KEY, 1, evicted=[OTHER])
    account.clear()
    demand(account, resident=[KEY], absent=[])
    demand(account, layer=1, absent=[OTHER])
    total = account.as_dict()
    assert (total["in_time"], total["cost_s"], total["issued"]) == (0, 0, 1)
