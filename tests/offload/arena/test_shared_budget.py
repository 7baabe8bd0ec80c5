"""One budget of experts and keys and values: who gives way to whom, when, and by how much."""

import gc
import re
from pathlib import Path

import pytest

from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, PAGES, build, each
from moeflow.core import ExpertKey
from moeflow.errors import ClosedModelError, ExpertReadError
from moeflow.offload.arena.shared_budget import SharedBudget

ALL = NUM_LAYERS * NUM_EXPERTS
LEAST = 3
UNIT = 12288  # bytes of a slot


@pytest.fixture
def budget():
    return SharedBudget(ALL * UNIT, UNIT, LEAST, ALL)


@pytest.fixture
def runtime(experts_files, budget):
    path = next(path for path, _, layout in experts_files if layout is PAGES)
    with build(path, ALL, layout=PAGES, governor=lambda pool: budget) as runtime:
        assert runtime.cache.limit * UNIT == budget.total_bytes
        yield runtime


def fill(runtime):
    """Let every expert be demanded once, in a pass."""
    runtime.begin_forward(1, 1, continues=True)
    for layer in range(NUM_LAYERS):
        for _ in each(runtime.fetch(layer, list(range(NUM_EXPERTS)))):
            pass


def arena_bytes(runtime):
    """Return the bytes of pages that the slots have."""
    begin = f"{runtime.resident_table._pool.address:x}-"
    maps = Path("/proc/self/smaps").read_text()
    at = re.search(rf"^{begin}.*?^Rss: +(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    return int(at[1]) * 1024


def test_experts_have_left_when_keys_and_values_may_come(runtime, budget):
    fill(runtime)
    assert runtime.cache.used == ALL
    share = budget.share(runtime)
    assert share.hold(5 * UNIT + 1)
    assert (runtime.cache.used, runtime.cache.limit) == (ALL - 6, ALL - 6)
    runtime.check_integrity()
    fill(runtime)
    assert runtime.cache.used == ALL - 6
    assert budget.peak_bytes == ALL * UNIT


def test_what_experts_had_goes_back_to_the_system_before(runtime, budget):
    fill(runtime)
    before = arena_bytes(runtime)
    assert before >= ALL * UNIT
    assert budget.share(runtime).hold(7 * UNIT)
    assert arena_bytes(runtime) <= before - 7 * UNIT


def test_the_fewest_experts_stay_and_what_is_refused_changes_nothing(runtime, budget):
    fill(runtime)
    share = budget.share(runtime)
    assert share.most_bytes == (ALL - LEAST) * UNIT
    assert share.hold(UNIT)
    assert not share.hold(share.most_bytes + 1)
    assert (share.num_bytes, runtime.cache.used) == (UNIT, ALL - 1)
    assert share.hold(share.most_bytes)
    assert runtime.cache.used == LEAST


def test_two_engines_cannot_have_the_same_bytes(runtime, budget):
    one, other = budget.share(runtime), budget.share(runtime)
    assert one.hold(10 * UNIT)
    assert other.most_bytes == (ALL - LEAST - 10) * UNIT
    assert not other.hold(6 * UNIT)
    assert other.hold(5 * UNIT)
    assert one.hold(4 * UNIT)
    assert other.hold(11 * UNIT)
    assert budget.key_value_bytes == 15 * UNIT


def test_an_engine_that_is_gone_has_nothing(runtime, budget):
    share = budget.share(runtime)
    assert share.hold(9 * UNIT)
    del share
    gc.collect()
    assert budget.key_value_bytes == 0
    fill(runtime)
    assert runtime.cache.used == ALL


def test_experts_come_back_in_steps_and_never_while_a_conversation_grows():
    budget, unit = SharedBudget(1000 * UNIT, UNIT, 10, 960), UNIT
    share, limit, limits = budget.share(None), 960, []
    for held in range(50 * unit, 500 * unit, unit // 3):
        for now in (held, held + 3 * unit // 2):  # what is copied is gone at the next pass
            share.num_bytes = now
            limits.append(limit := budget.slots(0, limit))
            assert limit * unit + now <= budget.total_bytes
    assert limits == sorted(limits, reverse=True)
    raised = []
    for held in range(500 * unit, 0, -unit):
        share.num_bytes = held
        before, limit = limit, budget.slots(0, limit)
        raised += [limit - before] if limit != before else []
    assert min(raised[:-1]) >= 15  # a sixty-fourth; the last ones come all together
    share.num_bytes = 0
    assert budget.slots(0, limit) == 960


def test_prefetches_under_way_end_before_their_slots_are_taken(runtime, budget):
    share = budget.share(runtime)
    with runtime.changing() as residency:
        keys = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
        while keys and residency.transfers.has_room and residency.copy(keys.pop()) is not None:
            pass
        assert residency.cache.num_pinned == residency.cache.used > 0
    before = runtime.cache.used
    assert share.hold((ALL - before + 1) * UNIT)
    assert runtime.cache.used <= before - 1
    assert runtime.cache.num_pinned == 0
    runtime.check_integrity()


def test_where_experts_cannot_leave_nothing_is_held(runtime, budget, monkeypatch):
    fill(runtime)
    share = budget.share(runtime)
    assert share.hold(UNIT)

    def interrupted(slots):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime.resident_table._pool, "discard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        share.hold(4 * UNIT)
    monkeypatch.undo()
    assert share.num_bytes == UNIT
    fill(runtime)
    runtime.check_integrity()
    assert share.hold(4 * UNIT)
    assert runtime.cache.used == ALL - 4


def test_after_an_interrupt_no_empty_slot_has_pages(runtime, budget):
    fill(runtime)
    with pytest.raises(ExpertReadError), runtime.changing():
        raise ExpertReadError("in the middle")
    runtime.check_integrity()  # mends
    assert runtime.cache.used == 0
    assert arena_bytes(runtime) == 0


def test_of_a_closed_model_nothing_more_is_taken_and_what_there_is_can_be_given_back(runtime, budget):
    share = budget.share(runtime)
    assert share.hold(UNIT)
    runtime.close()
    with pytest.raises(ClosedModelError):
        share.hold(2 * UNIT)
    assert share.hold(0)
    assert budget.key_value_bytes == 0


def test_stats_tell_of_both_sides(runtime, budget):
    fill(runtime)
    share = budget.share(runtime)
    assert share.hold(2 * UNIT)
    memory = runtime.stats()["memory"]
    told = {name: memory[name] for name in ("shared_budget_bytes", "shared_peak_bytes", "key_value_bytes")}
    assert told == {"shared_budget_bytes": ALL * UNIT, "shared_peak_bytes": ALL * UNIT, "key_value_bytes": 2 * UNIT}
    assert memory["device_bytes"] == memory["expert_budget_bytes"] == (ALL - 2) * UNIT
