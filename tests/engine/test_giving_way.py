"""Where memory ends a request gives way and goes on later as if nothing had happened; priorities; a full queue."""

import pytest

from helpers.engine_requests import POSITION_BYTES, assert_empty, generated, tokens
from helpers.rope_models import ORIGINAL, rope_model, truth
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, QueueFullError

NEW = 90  # so that slots grow: they begin with 64 positions beyond the prompt
LONG = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
PROMPTS = [tokens(5 + 3 * seed, seed) for seed in range(8)]
TIGHT = 170 * POSITION_BYTES


@pytest.fixture(scope="module")
def expected(mixtral):
    return [generated(mixtral, prompt, NEW) for prompt in PROMPTS]


def run(engine, found=None):
    """Step to the end, checking all the way; return the outputs by id."""
    found = {} if found is None else found
    while not engine.finished:
        for output in engine.step():
            found.setdefault(output.id, []).append(output)
        engine.check_integrity()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"share_prefixes": False}, {"max_step_tokens": 9}], ids=str)
def test_eight_requests_in_memory_for_two_are_answered_as_alone(mixtral, expected, options):
    with Engine(mixtral, max_batch_size=8, kv_memory=TIGHT, **options) as engine:
        ids = [engine.add(prompt, LONG) for prompt in PROMPTS]
        found = run(engine)
        for id, tokens_wanted in zip(ids, expected, strict=True):
            outputs = found[id]
            assert [token for one in outputs for token in one.token_ids] == tokens_wanted, "each token is told once"
            assert outputs[-1].completion.token_ids == tokens_wanted
        stats = engine.stats()
        assert stats["preempted"] > 1
        assert stats["kv_peak_bytes"] <= TIGHT
        assert stats["kv_kept_bytes"] <= TIGHT
        assert_empty(engine)


@pytest.mark.slow
def test_a_request_that_moves_to_host_memory_is_answered_as_alone(mixtral, expected, monkeypatch):
    with Engine(mixtral, kv_memory=142 * POSITION_BYTES) as engine:
        monkeypatch.setattr(engine._memory._moved, "allowed", True)
        ids, found = [engine.add(PROMPTS[0], LONG)], {}
        for _ in range(5):  # so that the second one need not grow when the first one does
            found.update((output.id, [output]) for output in engine.step())
        ids += [engine.add(prompt, LONG) for prompt in PROMPTS[1:4]]
        run(engine, found)
        assert [found[id][-1].completion.token_ids for id in ids] == expected[:4]
        assert engine.stats()["moved"] > 0
        assert not engine._memory._moved
        assert_empty(engine)


@pytest.mark.slow
def test_seeds_stop_strings_and_streams_go_on(speaking, tokenizer):
    params = [SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=1.0, seed=seed) for seed in range(7)]
    prompts = [f"{number} quick foxes" for number in range(7)]
    with Engine(speaking, tokenizer) as engine:
        alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
        position = engine.stats()["kv_position_bytes"]
    stop = next(text for text in (alone[0].text[60 + place : 63 + place] for place in range(20)) if len(text) == 3)
    params[0] = SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=1.0, seed=0, stop=(stop,))
    with Engine(speaking, tokenizer, kv_memory=240 * position, max_batch_size=7) as engine:
        ids = [engine.add(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        found = run(engine)
        assert engine.stats()["preempted"] > 0
        for id, one in list(zip(ids, alone, strict=True))[1:]:
            assert "".join(output.text for output in found[id]) == one.text
            assert found[id][-1].completion.token_ids == one.token_ids
        cut = found[ids[0]][-1].completion
        assert (cut.finish_reason, cut.text) == ("stop", alone[0].text[: alone[0].text.find(stop)])
        assert_empty(engine)


def test_a_request_may_be_cancelled_in_every_state(mixtral, expected):
    with Engine(mixtral, max_batch_size=8, max_step_tokens=16, kv_memory=TIGHT) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.add(prompt, LONG, id=str(number))
        cancelled, found = {}, {}
        while not engine.finished:
            scheduler = engine._scheduler
            states = {
                "prefill": [one for one in scheduler.running if one.begun and not one.token_ids],
                "decode": [one for one in scheduler.running if one.decoding and len(one.token_ids) > 3],
                "waits": scheduler._queue[1:],
                "gave way": scheduler._preempted,
            }
            for state, those in states.items():
                if those and state not in cancelled and len(those[0].prompt_ids) != len(PROMPTS[0]):
                    cancelled[state] = those[0].id
                    assert engine.cancel(those[0].id)
                    engine.check_integrity()
            found |= {one.id: one.completion for one in engine.step() if one.completion}
            engine.check_integrity()
        assert cancelled.keys() == states.keys()
        for number, wanted in enumerate(expected):
            completion = found[str(number)]
            assert completion.finish_reason == ("cancelled" if str(number) in cancelled.values() else "length")
            assert completion.token_ids == wanted[: len(completion.token_ids)]
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["dynamic", "longrope", "longrope, cache dropped"])
def test_keys_that_depend_on_the_length_are_computed_again_as_they_were(rope):
    model = rope_model(rope)
    prompts = [tokens(ORIGINAL - 6, 1), tokens(ORIGINAL + 3, 2), tokens(4, 3)]
    new = SamplingParams(max_new_tokens=20, ignore_eos=True)
    wanted = [truth(model, prompt)[:8] for prompt in prompts]
    with Engine(model) as engine:
        whole = [one.token_ids for one in engine.generate(prompts, new)]
    assert [one[:8] for one in whole] == wanted
    with Engine(model, max_step_tokens=16, max_batch_size=3) as engine:
        ids, found, gone = [engine.add(prompt, new) for prompt in prompts], {}, set()
        while not engine.finished:
            for one in list(engine._scheduler.running):  # each gives way twice, in the middle of its answer
                state = one.id, len(one.token_ids)
                if state[1] in (5, 14) and state not in gone:
                    gone.add(state)
                    engine._memory.preempt(one, one)
                    engine._scheduler.running.remove(one)
                    one.num_computed = 0
                    engine._scheduler._preempted.insert(0, one)
                    engine.check_integrity()
            found |= {one.id: one.completion for one in engine.step() if one.completion}
        assert engine.stats()["preempted"] == 6
        assert [found[id].token_ids for id in ids] == whole
        assert_empty(engine)


def test_a_large_limit_of_new_tokens_takes_no_memory_before_it_is_needed(mixtral):
    with Engine(mixtral, kv_memory=256 * POSITION_BYTES, share_prefixes=False) as engine:
        for prompt in PROMPTS[:3]:
            engine.add(prompt, SamplingParams(max_new_tokens=200, ignore_eos=True))
        engine.step()
        stats = engine.stats()
        assert stats["running"] == 3
        assert stats["kv_used_bytes"] == sum(len(prompt) + 64 for prompt in PROMPTS[:3]) * POSITION_BYTES


def test_native_steps_read_a_slot_where_it_has_grown_to(mixtral_folder, expected):
    model = load_moe(mixtral_folder, expert_memory="100%", predictor=None, step="auto", device="cpu")
    with model.moeflow, Engine(model) as engine:
        found = engine.generate(PROMPTS[:2], LONG)
        assert [one.token_ids for one in found] == expected[:2]
        if model.moeflow.step is not None:
            assert model.moeflow.step.num_steps >= NEW - 2
        assert_empty(engine)


def test_a_higher_priority_begins_first(mixtral):
    with Engine(mixtral, max_batch_size=1) as engine:
        for priority in (0, 1, 5, 5, -1):
            engine.add(PROMPTS[0], SamplingParams(max_new_tokens=1), priority=priority)
        order = list(run(engine))
        assert order == [f"request-{number}" for number in (3, 4, 2, 1, 5)]
        with pytest.raises(ConfigError, match="priority=1000"):
            engine.add(PROMPTS[0], priority=1000)


def test_a_request_beyond_those_that_may_wait_is_refused_and_the_others_go_on(mixtral, expected):
    with Engine(mixtral, max_batch_size=2, max_waiting=1) as engine:
        ids = [engine.add(prompt, LONG) for prompt in PROMPTS[:3]]
        with pytest.raises(QueueFullError, match="3 requests are under way, and max_waiting=1"):
            engine.add(PROMPTS[3], LONG)
        with pytest.raises(QueueFullError):
            engine.generate([PROMPTS[3]], LONG)
        found = run(engine)
        assert [found[id][-1].completion.token_ids for id in ids] == expected[:3]
        assert engine.generate([PROMPTS[3]], LONG)[0].token_ids == expected[3]
        assert_empty(engine)


def test_a_request_that_the_machine_has_no_memory_for_fails_and_the_others_go_on(mixtral, expected, monkeypatch):
    empty = KeyValueSlot.empty.__func__

    def limited(cls, layout, num_positions):
        if num_positions > 80:
            raise RuntimeError("the machine has no memory")
        return empty(cls, layout, num_positions)

    with Engine(mixtral) as engine:
        monkeypatch.setattr(KeyValueSlot, "empty", classmethod(limited))
        large = engine.add(tokens(120), LONG)
        others = [engine.add(prompt, LONG) for prompt in PROMPTS[:2]]
        found = run(engine)
        assert found[large][-1].completion.finish_reason == "error"
        assert "no memory for keys and values: the machine has no memory" in found[large][-1].completion.error
        assert [found[id][-1].completion.token_ids for id in others] == expected[:2]
        assert_empty(engine)


def test_a_request_whose_slot_the_machine_cannot_let_grow_fails_with_the_tokens_it_has(mixtral, expected, monkeypatch):
    def without_memory(slot, num_positions, num_written):
        raise RuntimeError("the machine has no memory")

    with Engine(mixtral) as engine:
        monkeypatch.setattr(KeyValueSlot, "grow", without_memory)
        completion, short = engine.generate(PROMPTS[:2], [LONG, SamplingParams(max_new_tokens=8, ignore_eos=True)])
        assert completion.finish_reason == "error"
        assert completion.token_ids == expected[0][:65]
        assert short.token_ids == expected[1][:8]
        assert_empty(engine)
