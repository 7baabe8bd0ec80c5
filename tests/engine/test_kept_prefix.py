"""A beginning that many prompts share is computed once, also where whoever computed it has ended; nothing is left."""

import pytest
import torch

from moeflow.engine.engine import Engine
from moeflow.engine.kept_prefix import KeptPrefix
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Sequence

NEW = 4
PREFIX = torch.randint(3, 120, (20,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = [[*PREFIX, 3 + place, 7] for place in range(5)]
PARAMS = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
TAIL = 2  # tokens behind the prefix


@pytest.fixture(scope="module")
def expected(mixtral):
    out = []
    for prompt in PROMPTS:
        ids = mixtral.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        out.append(ids[0, len(prompt) :].tolist())
    return out


def assert_empty(engine):
    stats = engine.stats()
    assert (stats["kv_used_bytes"], stats["running"], stats["waiting"], len(engine._slots)) == (0, 0, 0, 0)
    engine.check_integrity()


def run(engine):
    """Step to the end, checking all the way; return the answers by id."""
    answers = {}
    while not engine.finished:
        for progress in engine.step():
            if progress.completion is not None:
                answers[progress.id] = progress.completion.token_ids
        engine.check_integrity()
    return answers


@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_a_beginning_is_computed_once_whoever_has_ended_meanwhile(mixtral, expected, max_batch_size):
    with Engine(mixtral, max_batch_size=max_batch_size) as engine:
        ids = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
        answers = run(engine)
        assert [answers[id] for id in ids] == expected
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + len(PROMPTS) * TAIL
        assert_empty(engine)


def test_what_is_kept_gives_way_where_room_is_needed(mixtral, expected):
    with Engine(mixtral) as engine:
        position = engine.stats()["kv_position_bytes"]
    room = (len(PREFIX) + TAIL + NEW - 1) * position
    with Engine(mixtral, kv_memory=room) as engine:
        ids = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
        answers = run(engine)
        assert [answers[id] for id in ids] == expected
        assert engine.stats()["kv_peak_bytes"] == room
        assert engine.stats()["shared_tokens"] == 0
        assert_empty(engine)


def test_nothing_is_kept_once_nobody_waits_for_it(mixtral):
    with Engine(mixtral, max_batch_size=2) as engine:
        engine.add(PROMPTS[0], PARAMS, id="first")
        engine.add([9, 8, 7], SamplingParams(max_new_tokens=30, ignore_eos=True), id="other")
        engine.add(PROMPTS[1], PARAMS, id="sharer")
        while "first" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["first"]
        engine.check_integrity()
        engine.cancel("sharer")
        assert engine._kept.donors() == []
        engine.check_integrity()
        engine.cancel("other")
        assert_empty(engine)


def test_nothing_is_kept_once_who_waited_has_begun(mixtral):
    with Engine(mixtral, max_batch_size=1) as engine:
        for id in ("first", "sharer"):
            engine.add(PROMPTS[0], PARAMS, id=id)
        while "first" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["first"]
        engine.step()
        assert engine.stats()["running"] == 1
        assert engine._kept.donors() == []


def test_a_name_may_be_used_again_while_its_slot_is_kept(mixtral, expected):
    with Engine(mixtral, max_batch_size=2) as engine:
        for id, prompt in (("name", PROMPTS[0]), ("other", [9, 8, 7]), ("sharer", PROMPTS[1])):
            engine.add(prompt, PARAMS, id=id)
        while "name" in engine._requests:
            engine.step()
        assert [one.id for one in engine._kept.donors()] == ["name"]
        engine.add(PROMPTS[2], PARAMS, id="name")
        answers = run(engine)
        assert (answers["sharer"], answers["name"]) == (expected[1], expected[2])
        assert_empty(engine)


@pytest.mark.parametrize("sharer", [PREFIX[:10] + [1] * 20, [*PREFIX[:16]]])
def test_nothing_is_kept_for_a_beginning_too_short_to_share(mixtral, sharer):
    with Engine(mixtral, max_batch_size=1) as engine:
        engine.add(PROMPTS[0], PARAMS)
        engine.add(sharer, PARAMS)
        while not engine.finished:
            engine.step()
            assert engine._kept.donors() == []


def test_nothing_is_kept_where_nothing_is_shared(mixtral):
    with Engine(mixtral, max_batch_size=1, share_prefixes=False) as engine:
        for prompt in PROMPTS:
            engine.add(prompt, PARAMS)
        while not engine.finished:
            engine.step()
            assert engine._kept.donors() == []
        assert engine.stats()["prompt_tokens"] == sum(map(len, PROMPTS))


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
        engine.add(prompt, PARAMS)
    while not engine._kept.donors():
        engine.step()
    engine.close()
    assert_empty(engine)
