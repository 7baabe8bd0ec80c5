"""Cancelled requests and closed engines leave nothing behind."""

import pytest

from helpers.engine_requests import GREEDY, PROMPTS, assert_empty, generated
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.errors import ClosedModelError, ConfigError


def test_a_cancelled_request_frees_its_slot_and_keeps_what_it_had(mixtral, expected):
    engine = Engine(mixtral, max_batch_size=2)
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    used = engine.stats()["kv_used_bytes"]
    assert engine.cancel(ids[0])
    assert engine.cancel(ids[-1])  # still waiting
    assert not engine.cancel(ids[0])
    assert not engine.cancel("nobody")
    assert engine.stats()["kv_used_bytes"] < used
    engine.check_integrity()
    done = {}
    while not engine.finished:
        done |= {one.id: one.completion for one in engine.step() if one.completion}
    assert (done[ids[0]].finish_reason, done[ids[0]].token_ids) == ("cancelled", expected[0][:3])
    assert (done[ids[-1]].finish_reason, done[ids[-1]].token_ids) == ("cancelled", [])
    assert [done[id].token_ids for id in ids[1:-1]] == expected[1:-1]
    assert_empty(engine)


def test_an_id_that_is_under_way_is_refused(mixtral):
    engine = Engine(mixtral)
    engine.add(PROMPTS[0], GREEDY, id="mine")
    with pytest.raises(ConfigError, match="'mine' is under way"):
        engine.add(PROMPTS[1], GREEDY, id="mine")
    while not engine.finished:
        engine.step()
    assert engine.add(PROMPTS[1], GREEDY, id="mine") == "mine"


def test_a_closed_engine_has_released_everything_and_the_model_goes_on(mixtral, expected):
    engine = Engine(mixtral)
    engine.add(PROMPTS[0], GREEDY)
    engine.step()
    engine.close()
    assert engine.finished
    assert engine.stats()["kv_used_bytes"] == 0
    with pytest.raises(ClosedModelError):
        engine.step()
    with pytest.raises(ClosedModelError):
        engine.add(PROMPTS[0], GREEDY)
    assert generated(mixtral, PROMPTS[0]) == expected[0]


def test_a_model_that_was_closed_says_so(mixtral_folder):
    model = load_moe(mixtral_folder)
    engine = Engine(model)
    model.moeflow.close()
    engine.add(PROMPTS[0], GREEDY)
    with pytest.raises(ClosedModelError):
        engine.step()
