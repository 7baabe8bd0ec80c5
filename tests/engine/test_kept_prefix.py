"""A beginning is computed once: beside who runs, and after who has ended, as long as its room is not needed."""

import pytest
import torch

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
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.rope_models import rope_model, truth
from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.slots import KeyValueSlot

PROMPTS = [[*PREFIX, 3 + place, 7] for place in range(5)]
TAIL = 2  # tokens behind the prefix


@pytest.fixture(scope="module")
def expected(mixtral):
    return [generated(mixtral, prompt) for prompt in PROMPTS]


def run(engine):
    """Step to the end, checking all the way; return the completions by id."""
    found = {}
    while not engine.finished:
        found |= {one.id: one.completion for one in engine.step() if one.completion}
        engine.check_integrity()
    return found


@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_a_beginning_is_computed_once_whoever_has_ended_meanwhile(mixtral, expected, max_batch_size):
    with Engine(mixtral, max_batch_size=max_batch_size) as engine:
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == expected
        assert [found[id].cached_tokens for id in ids] == [0] + [len(PREFIX)] * 4
        stats = engine.stats()
        assert stats["prompt_tokens"] == len(PREFIX) + len(PROMPTS) * TAIL
        assert stats["shared_tokens"] == 4 * len(PREFIX)
        assert_empty(engine)


def test_what_is_kept_gives_way_where_room_is_needed(mixtral, expected):
    room = (len(PREFIX) + TAIL + NEW - 1) * POSITION_BYTES
    with Engine(mixtral, kv_memory=room) as engine:
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == expected
        assert engine.stats()["kv_peak_bytes"] == room
        assert engine.stats()["shared_tokens"] == 0
        assert_empty(engine)


@pytest.mark.parametrize("kept", [True, False])
def test_prompt_and_answer_are_kept_after_the_end_unless_nothing_is_shared(mixtral, expected, kept):
    with Engine(mixtral, share_prefixes=kept) as engine:
        engine.generate([PROMPTS[0]], GREEDY)
        stats = engine.stats()
        assert stats["kv_kept_tokens"] == kept * (len(PROMPTS[0]) + NEW - 1)
        assert stats["kv_kept_bytes"] == stats["kv_kept_tokens"] * POSITION_BYTES
        second = [*PROMPTS[0], *expected[0], 9, 9, 9]
        (completion,) = engine.generate([second], GREEDY)
        assert completion.token_ids == generated(mixtral, second)
        assert completion.cached_tokens == stats["kv_kept_tokens"]
        assert engine.stats()["kept_hits"] == kept
        assert_empty(engine)


def test_others_go_on_with_a_beginning_that_has_moved_into_a_running_sequence_and_after_its_end(mixtral, expected):
    whole = [*PROMPTS[0], *expected[0]]
    prompts = [[*whole, 9], [*whole, 8, 8], [*whole[:20], 4]]
    with Engine(mixtral) as engine:
        engine.generate([PROMPTS[0]], GREEDY)
        engine.add(prompts[0], GREEDY, id="first")
        engine.step()
        assert engine.stats()["kv_kept_tokens"] == 0
        ids = [engine.add(prompt, GREEDY) for prompt in prompts[1:]]
        engine.step()
        engine.cancel("first")
        found = run(engine)
        assert [found[id].token_ids for id in ids] == [generated(mixtral, prompt) for prompt in prompts[1:]]
        assert [found[id].cached_tokens for id in ("first", *ids)] == [len(whole) - 1, len(whole), 20]
        (again,) = engine.generate([prompts[0]], GREEDY)
        assert again.token_ids == generated(mixtral, prompts[0])
        assert again.cached_tokens == len(whole)
        assert_empty(engine)


def test_equal_prompts_compute_their_last_token_each(mixtral):
    with Engine(mixtral) as engine:
        first, *others = answers(engine, [PREFIX] * 3)
        assert others == [first] * 2
        assert first == generated(mixtral, PREFIX)
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + 2
        assert answers(engine, [PREFIX]) == [first]
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + 3


def test_a_beginning_too_short_to_be_copied_is_not_kept(mixtral):
    with Engine(mixtral) as engine:
        engine.generate([[5, 6, 7]], GREEDY)
        assert engine.stats()["kv_kept_tokens"] == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_what_a_cancelled_request_has_computed_is_kept(mixtral, steps):
    prompt = tokens(40)
    with Engine(mixtral, max_step_tokens=32) as engine:
        engine.add(prompt, GREEDY, id="cancelled")
        for _ in range(steps):
            engine.step()
        engine.cancel("cancelled")
        engine.step()
        computed = [0, 32, 40, None, 42][steps]
        assert engine.stats()["kv_kept_tokens"] == computed
        (completion,) = engine.generate([prompt], GREEDY)
        assert completion.token_ids == generated(mixtral, prompt)
        assert completion.cached_tokens == min(computed, 39)
        assert_empty(engine)


def test_of_a_request_that_failed_nothing_is_kept(mixtral, monkeypatch):
    with Engine(mixtral) as engine:
        engine.add(PROMPTS[0], GREEDY)
        engine.step()
        monkeypatch.setattr(engine._runner, "_forward", lambda pieces: (_ for _ in ()).throw(RuntimeError("broken")))
        engine.step()
        assert engine.stats()["finished"]["error"] == 1
        assert engine.stats()["kv_kept_tokens"] == 0
        assert_empty(engine)


def conversation(engine, model, turns, prompt):
    """Answer turns one after the other, each with all before; check each answer; return completions and the whole."""
    completions = []
    for turn in turns:
        prompt = [*prompt, *turn]
        (completion,) = engine.generate([prompt], GREEDY)
        assert completion.token_ids == generated(model, prompt)
        completions.append(completion)
        prompt = [*prompt, *completion.token_ids]
    return completions, prompt


# plain, latent, sinks and windows, two shapes and shared keys, norms of keys
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "gemma4", "qwen3_moe", "olmoe"])
def test_a_conversation_and_its_branches_are_answered_as_without_what_is_kept(name):
    torch.set_num_threads(1)
    model = build_model(FAMILIES[name])
    turns = [tokens(20, 1), tokens(5, 2), tokens(6, 3)]
    with Engine(model, max_batch_size=4, max_step_tokens=16) as engine:
        completions, whole = conversation(engine, model, turns, [])
        assert [one.cached_tokens for one in completions] == [0, 20 + NEW - 1, 25 + 2 * NEW - 1]
        branches = [[*whole[:30], *tokens(3, seed)] for seed in range(4, 7)]
        found = engine.generate(branches, GREEDY)
        assert [one.token_ids for one in found] == [generated(model, prompt) for prompt in branches]
        assert [one.cached_tokens for one in found] == [30] * 3
        kept = engine.stats()["kv_kept_tokens"]
        assert kept == len(whole) - 1 + 3 * (3 + NEW - 1)
        assert_empty(engine)


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "longrope, cache dropped"])
def test_where_keys_depend_on_the_length_a_conversation_is_answered_as_without(rope):
    model, prompt = rope_model(rope), []
    with Engine(model, max_step_tokens=32) as engine:
        for turn in (tokens(17, 1), tokens(4, 2), tokens(4, 3), tokens(4, 4)):
            prompt = [*prompt, *turn]
            for _ in range(2):
                (completion,) = engine.generate([prompt], GREEDY)
                assert completion.token_ids == truth(model, prompt)
            if "dropped" not in rope:  # there the end of an answer may replace all keys by those of another scaling
                assert completion.cached_tokens == len(prompt) - 1
            prompt += completion.token_ids
            assert_empty(engine)


def test_what_is_kept_leaves_in_the_middle_of_a_run_and_answers_stay_the_same(mixtral):
    prompts = [tokens(20 + seed, seed) for seed in range(8)]
    expected = [generated(mixtral, prompt) for prompt in prompts]
    with Engine(mixtral, max_batch_size=2, kv_memory=80 * POSITION_BYTES) as engine:
        kept = []
        for _ in range(3):
            ids = [engine.add(prompt, GREEDY) for prompt in [*prompts, prompts[-1]]]
            found = run(engine)
            assert [found[id].token_ids for id in ids] == [*expected, expected[-1]]
            kept.append(engine.stats()["kv_kept_tokens"])
            assert 0 < kept[-1] <= 80
        assert engine.stats()["kept_hits"] > 0
        assert_empty(engine)


def test_a_sequence_gets_the_memory_of_what_is_kept(mixtral, monkeypatch):
    prompts = [[*PREFIX, 5], [*PREFIX, 6]]
    with Engine(mixtral, max_batch_size=1) as engine:
        empty = KeyValueSlot.empty.__func__

        def machine_without_room_for_two(cls, layout, num_positions):
            if engine.stats()["kv_kept_bytes"]:
                raise RuntimeError("there is no memory")
            return empty(cls, layout, num_positions)

        monkeypatch.setattr(KeyValueSlot, "empty", classmethod(machine_without_room_for_two))
        assert answers(engine, prompts) == [generated(mixtral, prompt) for prompt in prompts]
        assert_empty(engine)


def test_an_id_is_free_again_while_its_beginning_is_kept(mixtral, expected):
    with Engine(mixtral) as engine:
        for _ in range(3):
            engine.add(PROMPTS[0], GREEDY, id="name")
            assert run(engine)["name"].token_ids == expected[0]


def test_what_is_closed_keeps_nothing(mixtral):
    engine = Engine(mixtral, max_batch_size=1)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    while not engine.stats()["kv_kept_tokens"]:
        engine.step()
    engine.close()
    assert engine.stats()["kv_kept_bytes"] == 0
    assert_empty(engine)
