"""Memory of keys and values: one budget for slots and what is kept; growth, giving way, and moves to host memory."""

from types import SimpleNamespace

import pytest

from helpers.small_slots import TINY, TINY_POSITION, has_names, write_names
from moeflow.engine.kv_cache.budget import most_kept
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sequence import Sequence
from moeflow.errors import BudgetError

TEXT = [chr(ord("a") + place % 26) for place in range(200)]


def memory_of(num_positions, **options):
    return KeyValueMemory(TINY, num_positions * TINY_POSITION, **options)


def running(memory, id, prompt, most=1000):
    """A sequence with its slot, and its prompt computed."""
    sequence = Sequence(id, list(prompt), most)
    assert memory.admit(sequence)
    compute(memory, sequence)
    return sequence


def compute(memory, sequence):
    write_names(memory[sequence.id], None, sequence.prompt_ids + sequence.token_ids)
    sequence.num_computed = sequence.length


def crowded(memory):
    """A sequence of 60 positions, and one of 40 that is to grow by 29, in a memory of 100."""
    victim, grower = running(memory, "victim", TEXT[:60], 1), running(memory, "grower", TEXT[100:140], 1)
    grower.max_new_tokens = 30
    grower.token_ids.append("z")
    return victim, grower


def positions(memory, id):
    memory.check_integrity()
    return memory[id].num_positions


def test_a_slot_has_what_its_sequence_may_need_or_a_few_more_than_its_tokens():
    memory = memory_of(1000)
    running(memory, "short", TEXT[:20], 8)
    running(memory, "long", TEXT[:20], 800)
    assert (positions(memory, "short"), positions(memory, "long")) == (27, 84)
    assert memory.used_bytes == (27 + 84) * TINY_POSITION


def test_a_full_slot_grows_by_half_up_to_what_its_sequence_may_need():
    memory = memory_of(1000)
    sequence = running(memory, "one", TEXT[:150], 150)
    found = []
    while sequence.length < sequence.num_positions:
        sequence.token_ids.append("z")
        assert memory.grow(sequence)
        assert has_names(memory["one"], None, sequence.prompt_ids)
        found.append(positions(memory, "one"))
        compute(memory, sequence)
    assert sorted(set(found)) == [214, 299]


def test_a_slot_grows_by_less_where_there_is_less_and_not_at_all_where_there_is_nothing():
    memory = memory_of(100)
    one, two = running(memory, "one", TEXT[:10]), running(memory, "two", TEXT[10:20], 17)
    assert (positions(memory, "one"), positions(memory, "two")) == (74, 26)
    one.token_ids += ["z"] * 65
    assert not memory.grow(one)
    memory.keep(two)  # too short to be of use
    assert memory.kept_bytes == 0
    assert memory.grow(one)
    assert positions(memory, "one") == 100


def test_what_ended_is_kept_until_its_room_is_needed_what_is_wanted_now_the_longest():
    memory = memory_of(100)
    for begin in (0, 30, 60):
        memory.keep(running(memory, "name", TEXT[begin : begin + 30], 1))
    assert (memory.used_bytes, memory.kept_bytes) == (0, 90 * TINY_POSITION)
    again = Sequence("again", [*TEXT[:30], "q"], 10)
    assert memory.admit(again)  # 40 positions: what it will copy stays, and the next one leaves
    assert again.num_computed == 30
    assert has_names(memory["again"], None, TEXT[:30])
    assert [memory.num_kept(Sequence("x", [*TEXT[at : at + 30], "q"], 1)) for at in (0, 30, 60)] == [0, 30, 30]
    memory.check_integrity()
    assert memory.counts == {"shared_tokens": 30, "kept_hits": 1, "preempted": 0, "moved": 0}
    assert memory.peak_bytes == 100 * TINY_POSITION


def test_nothing_leaves_for_a_sequence_that_finds_no_room_even_so():
    memory = memory_of(100)
    memory.keep(running(memory, "ended", TEXT[:30], 1))
    running(memory, "large", TEXT[30:90], 1)
    assert not memory.admit(Sequence("waits", TEXT[90:140], 1))
    assert memory.kept.num_tokens == 30


def test_the_last_token_of_a_prompt_is_never_taken_from_what_is_kept():
    memory = memory_of(100)
    memory.keep(running(memory, "ended", TEXT[:30], 1))
    assert [memory.num_kept(Sequence("x", TEXT[:count], 1)) for count in (16, 17, 30, 31)] == [0, 16, 29, 30]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_sequence_that_gives_way_leaves_as_much_as_there_is_room_for_beside_the_growth(keeps):
    memory = memory_of(100)
    memory.keeps = keeps
    victim, grower = running(memory, "victim", TEXT[:60], 1), running(memory, "grower", TEXT[100:110], 31)
    assert (positions(memory, "victim"), positions(memory, "grower")) == (60, 40)
    grower.max_new_tokens = 61  # of 70 positions, that is 30 more
    grower.token_ids += ["z"] * 31
    assert not memory.grow(grower)
    memory.preempt(victim, grower)
    assert memory.kept.num_tokens == 30 * keeps
    assert memory.grow(grower)
    assert positions(memory, "grower") == 70
    assert memory.num_kept(victim) == 30 * keeps


def test_a_sequence_that_gives_way_to_itself_leaves_what_it_has():
    memory = memory_of(100)
    victim = running(memory, "victim", TEXT[:60], 1)
    running(memory, "other", TEXT[100:140], 1)
    memory.preempt(victim, victim)
    assert memory.num_kept(victim) == 59
    assert memory.counts["preempted"] == 1


def test_a_sequence_moves_to_host_memory_where_that_pays_and_comes_back_with_all_of_it():
    memory = memory_of(100, moves=True)
    victim, grower = crowded(memory)
    memory.preempt(victim, grower)
    victim.num_computed = 0
    assert memory.counts["moved"] == 1
    assert memory.kept.num_tokens == 0
    assert memory.speeds.copy_s > 0
    assert memory.grow(grower)
    assert not memory.admit(victim)
    memory.free(grower)
    assert memory.admit(victim)
    assert victim.num_computed == 60
    assert has_names(memory["victim"], None, TEXT[:60])
    memory.check_integrity()
    assert not memory._moved


def test_what_lies_in_host_memory_leaves_with_its_sequence():
    memory = memory_of(100, moves=True)
    victim, grower = crowded(memory)
    memory.preempt(victim, grower)
    assert memory._moved
    memory.free(victim)
    assert not memory._moved


def test_where_copies_are_slow_a_sequence_that_gives_way_is_computed_again():
    memory = memory_of(100, moves=True)
    memory.speeds.saw_copy(1, 10.0)
    memory.speeds.saw_prefill(1, 0.001)
    victim, grower = crowded(memory)
    memory.preempt(victim, grower)
    assert memory.counts["moved"] == 0
    assert memory.kept.num_tokens == 31, "no more than the growth leaves"


def machine_with(monkeypatch, memory, num_positions):
    """Let the machine have memory for so many positions, whatever the budget is."""
    empty = KeyValueSlot.empty.__func__

    def limited(cls, layout, wanted):
        if memory.used_bytes + memory.kept_bytes + wanted * TINY_POSITION > num_positions * TINY_POSITION:
            raise RuntimeError("the machine has no memory")
        return empty(cls, layout, wanted)

    monkeypatch.setattr(KeyValueSlot, "empty", classmethod(limited))


def test_where_the_machine_has_less_than_the_budget_what_is_kept_leaves_and_then_sequences_wait(monkeypatch):
    memory = memory_of(1000)
    machine_with(monkeypatch, memory, 100)
    memory.keep(running(memory, "ended", TEXT[:60], 1))
    running(memory, "runs", TEXT[60:120], 1)
    assert memory.kept_bytes == 0
    waits, alone = Sequence("waits", TEXT[:60], 1), Sequence("alone", TEXT[:120], 1)
    assert not memory.admit(waits)
    assert not memory.refused
    memory.clear()
    assert not memory.admit(alone)
    assert memory.refused == {alone: "no memory for keys and values: the machine has no memory"}
    memory.free(alone)
    assert not memory.refused


def test_a_slot_that_the_machine_cannot_let_grow_is_refused_once_nothing_else_is_there(monkeypatch):
    memory = memory_of(1000)
    memory.keep(running(memory, "ended", TEXT[100:160], 1))
    one, two = running(memory, "one", TEXT[:10]), running(memory, "two", TEXT[:10])
    one.token_ids += ["z"] * 65

    def without_memory(slot, num_positions, num_written):
        raise RuntimeError("the machine has no memory")

    monkeypatch.setattr(KeyValueSlot, "grow", without_memory)
    assert not memory.grow(one)
    assert (memory.kept.num_tokens, memory.refused) == (0, {})
    memory.preempt(two, one)
    assert not memory.grow(one)
    assert list(memory.refused) == [one]


def test_what_there_is_no_memory_to_keep_is_let_go(monkeypatch):
    memory = memory_of(100)
    ended = running(memory, "ended", TEXT[:30], 20)

    def without_memory(slot, begin, end):
        raise RuntimeError("the machine has no memory")

    monkeypatch.setattr(KeyValueSlot, "give_up", without_memory)
    memory.keep(ended)
    assert (memory.used_bytes, memory.kept_bytes, len(memory)) == (0, 0, 0)
    memory.check_integrity()


def test_of_a_sequence_whose_scaling_changes_only_the_prompt_is_kept_under_its_scaling():
    memory = memory_of(1000)
    for id, boundary in (("changes", 25), ("stays", 100)):
        sequence = Sequence(id, TEXT[:20], 50, lambda length, boundary=boundary: (boundary, length > boundary))
        assert memory.admit(sequence)
        sequence.token_ids += TEXT[20:40]
        compute(memory, sequence)
        memory.keep(sequence)
        again = Sequence("again", TEXT[:25], 50, sequence.scaling_of)
        assert memory.num_kept(again) == (20 if id == "changes" else 24)
        beyond = Sequence("beyond", TEXT[:120], 50, sequence.scaling_of)
        assert memory.num_kept(beyond) == 0


def test_a_sequence_beyond_the_whole_budget_is_refused_with_both_numbers():
    memory = memory_of(10)
    memory.check_possible(10)
    with pytest.raises(BudgetError, match=rf"{11 * TINY_POSITION:,} bytes.*{10 * TINY_POSITION:,} bytes"):
        memory.check_possible(11)
    assert KeyValueMemory(TINY, 1 << 60, 10).budget_bytes == 10 * TINY_POSITION


def test_what_is_kept_has_a_limit_of_its_own():
    memory = memory_of(1000, most_kept_bytes=50 * TINY_POSITION)
    for number in range(4):
        memory.keep(running(memory, str(number), range(100 * number, 100 * number + 30)))
        assert memory.kept_bytes <= 50 * TINY_POSITION
        memory.check_integrity()
    last = Sequence("last", [*range(300, 330), 1], 10)
    assert memory.num_kept(last) == 30
    assert memory.kept.num_tokens == 50


def test_host_memory_keeps_a_share_of_what_the_process_may_use(monkeypatch):
    monkeypatch.setattr("moeflow.engine.kv_cache.budget.memory_limit_bytes", lambda: 1600)
    planned = SimpleNamespace(moeflow=SimpleNamespace(plan={"key_value_bytes": 7}))
    assert most_kept("auto", None) == 100
    assert most_kept("1GiB", None) is None
    assert most_kept("auto", planned) is None
