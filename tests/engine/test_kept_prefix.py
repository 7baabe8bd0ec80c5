"""A beginning that many prompts share is computed once, also after the first of them has ended; nothing is left."""

import pytest

from helpers.engine_requests import (
    GREEDY,
    NEW,
    POSITION_BYTES,
    PREFIX,
    answers,
    assert_empty,
    generated,
    tokens,
)
from moeflow.engine.engine import Engine
from moeflow.engine.kept_prefix import KeptPrefix
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Sequence
from moeflow.errors import BudgetError

PROMPTS = [[*PREFIX, 3 + place, 7] for place in range(5)]
TAIL = 2  # tokens behind the prefix


@pytest.fixture(scope="module")
def expected(mixtral):
    return [generated(mixtral, prompt) for prompt in PROMPTS]


def run(engine):
    """Step to the end, checking all the way; return the answers by id."""
    found = {}
    while not engine.finished:
        for output in engine.step():
            if output.completion is not None:
                found[output.id] = output.completion.token_ids
        engine.check_integrity()
    return found


@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_a_beginning_is_computed_once_whoever_has_ended_meanwhile(mixtral, expected, max_batch_size):
    with Engine(mixtral, max_batch_size=max_batch_size) as engine:
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        found = run(engine)
        assert [found[id] for id in ids] == expected
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + len(PROMPTS) * TAIL
        assert_empty(engine)


def test_what_is_kept_gives_way_where_room_is_needed(mixtral, expected):
    with Engine(mixtral) as engine:
        position = engine.stats()["kv_position_bytes"]
    room = (len(PREFIX) + TAIL + NEW - 1) * position
    with Engine(mixtral, kv_memory=room) as engine:
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        found = run(engine)
        assert [found[id] for id in ids] == expected
        assert engine.stats()["kv_peak_bytes"] == room
        assert engine.stats()["shared_tokens"] == 0
        assert_empty(engine)


def test_nothing_is_kept_once_nobody_waits_for_it(mixtral):
    with Engine(mixtral, max_batch_size=2) as engine:
        engine.add(PROMPTS[0], GREEDY, id="first")
        engine.add([9, 8, 7], SamplingParams(max_new_tokens=30, ignore_eos=True), id="other")
        engine.add(PROMPTS[1], GREEDY, id="sharer")
        while "first" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["first"]
        engine.check_integrity()
        engine.cancel("sharer")
        assert engine._kept.donors() == []
        engine.check_integrity()
        engine.cancel("other")
        engine.step()
        assert_empty(engine)


def test_nothing_is_kept_once_who_waited_has_begun(mixtral):
    with Engine(mixtral, max_batch_size=1) as engine:
        for id in ("first", "sharer"):
            engine.add(PROMPTS[0], GREEDY, id=id)
        while "first" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["first"]
        engine.step()
        assert engine.stats()["running"] == 1
        assert engine._kept.donors() == []


def test_a_name_may_be_used_again_while_its_slot_is_kept(mixtral, expected):
    with Engine(mixtral, max_batch_size=2) as engine:
        for id, prompt in (("name", PROMPTS[0]), ("other", [9, 8, 7]), ("sharer", PROMPTS[1])):
            engine.add(prompt, GREEDY, id=id)
        while "name" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["name"]
        engine.add(PROMPTS[2], GREEDY, id="name")
        found = run(engine)
        assert (found["sharer"], found["name"]) == (expected[1], expected[2])
        assert_empty(engine)


@pytest.mark.parametrize("sharer", [PREFIX[:10] + [1] * 20, [*PREFIX[:16]]])
def test_nothing_is_kept_for_a_beginning_too_short_to_share(mixtral, sharer):
    with Engine(mixtral, max_batch_size=1) as engine:
        engine.add(PROMPTS[0], GREEDY)
        engine.add(sharer, GREEDY)
        while not engine.finished:
            engine.step()
            assert engine._kept.donors() == []


def test_nothing_is_kept_where_nothing_is_shared(mixtral):
    with Engine(mixtral, max_batch_size=1, share_prefixes=False) as engine:
        for prompt in PROMPTS:
            engine.add(prompt, GREEDY)
        while not engine.finished:
            engine.step()
            assert engine._kept.donors() == []
        assert engine.stats()["prompt_tokens"] == sum(map(len, PROMPTS))


def test_a_shared_beginning_is_computed_once(mixtral):
    prompts = [[*PREFIX, 3 + place, 7] for place in range(5)]
    with Engine(mixtral) as engine:
        assert answers(engine, prompts) == [generated(mixtral, prompt) for prompt in prompts]
        stats = engine.stats()
    assert stats["shared_tokens"] == 4 * len(PREFIX)
    assert stats["prompt_tokens"] == len(PREFIX) + 5 * 2


def test_equal_prompts_compute_their_last_token_each(mixtral):
    with Engine(mixtral) as engine:
        first, *others = answers(engine, [PREFIX] * 3)
        assert others == [first] * 2
        assert first == generated(mixtral, PREFIX)
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + 2


def test_a_sequence_gets_the_memory_of_one_that_is_kept_to_be_shared(mixtral, monkeypatch):
    prompts = [[*PREFIX, 5], [*PREFIX, 6]]
    with Engine(mixtral, max_batch_size=1) as engine:
        allocate = engine._slots.allocate

        def machine_without_room_for_two(id, num_positions):
            if len(engine._slots):
                raise BudgetError("there is no memory")
            return allocate(id, num_positions)

        monkeypatch.setattr(engine._slots, "allocate", machine_without_room_for_two)
        assert answers(engine, prompts) == [generated(mixtral, prompt) for prompt in prompts]
        assert_empty(engine)


def test_an_id_is_free_again_while_its_beginning_is_kept_to_be_shared(mixtral):
    with Engine(mixtral, max_batch_size=2) as engine:
        done = {}

        def step():
            done.update((one.id, one.completion.token_ids) for one in engine.step() if one.completion)
            engine.check_integrity()

        for id, prompt in (("a", [*PREFIX, 5]), ("c", tokens(len(PREFIX) + 1, 9)), ("b", [*PREFIX, 6])):
            engine.add(prompt, GREEDY, id=id)
        while not done:
            step()
        del done["c"]  # it ended with the first, so that two come in at once
        assert [one.id for one in engine._kept.donors()] == ["a"]
        engine.add([*PREFIX, 7], GREEDY, id="a")
        while not engine.finished:
            step()
        assert done == {"a": generated(mixtral, [*PREFIX, 7]), "b": generated(mixtral, [*PREFIX, 6])}


@pytest.mark.parametrize("share", [True, False])
def test_a_beginning_is_kept_as_long_as_somebody_is_to_share_it(mixtral, share):
    one = (len(PREFIX) + NEW) * POSITION_BYTES
    for cancelled in (True, False):
        engine, done = Engine(mixtral, max_batch_size=1, share_prefixes=share), []
        for id, last in (("a", 5), ("b", 6)):
            engine.add([*PREFIX, last], GREEDY, id=id)
        while not done:
            done = [output for output in engine.step() if output.completion]
        assert engine.stats()["kv_used_bytes"] == one * share
        if cancelled:
            engine.cancel("b")
            assert engine.stats()["kv_used_bytes"] == 0
        else:
            engine.step()
            assert engine.stats()["kv_used_bytes"] == one
            assert engine.stats()["shared_tokens"] == len(PREFIX) * share
        engine.close()


def test_every_slot_that_is_offered_is_freed_once_and_the_last_wanted_one_is_kept():
    freed, wanted = [], {"a", "b"}
    kept = KeptPrefix(lambda sequence: sequence.id in wanted, freed.append)
    a, b, c = (Sequence(id, [1], 1) for id in "abc")
    kept.offer(a)
    assert (kept.donors(), freed) == ([a], [])
    kept.offer(b)
    kept.offer(c)
    assert (kept.donors(), freed) == ([b], ["a", "c"])
    kept.drop_unwanted()
    assert kept.donors() == [b]
    wanted.clear()
    kept.drop_unwanted()
    assert (kept.donors(), freed) == ([], ["a", "c", "b"])
    assert not kept.drop()


def test_what_is_closed_keeps_nothing(mixtral):
    engine = Engine(mixtral, max_batch_size=1)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    while not engine._kept.donors():
        engine.step()
    engine.close()
    assert_empty(engine)
