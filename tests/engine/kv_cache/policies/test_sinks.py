"""Sinks: memory is bounded, what is forgotten has no part in an answer, and a needle between is lost."""

import torch

from helpers.engine_requests import run_within, tokens
from helpers.needle_model import NO_ANSWER, answer_of, haystack, needle_model
from helpers.runner_passes import Passes
from helpers.small_models import tiny_mixtral
from moeflow import Engine, SamplingParams
from moeflow.engine.kv_cache.policies.choosing import policy_of

SINKS, WINDOW, LAYERS = 2, 10, 3
OPTION = {"name": "sinks", "sinks": SINKS, "window": WINDOW}
REACH = LAYERS * (WINDOW - 1)  # positions behind a token that it has any part in, by way of those between


def test_a_slot_grows_no_more_however_long_its_sequence():
    model, params = (
        tiny_mixtral(max_position_embeddings=4096, num_hidden_layers=1),
        SamplingParams(max_new_tokens=100, ignore_eos=True),
    )
    most = (SINKS + WINDOW + 64 + 16) * 2 * 2 * 16 * 4  # of one layer of the tiny Mixtral, with a pass of 16 tokens
    with Engine(model, max_batch_size=1, max_step_tokens=16, kv_policy=OPTION) as engine:
        for prompt in (tokens(9), tokens(400)):
            run_within(engine, prompt, params, most)
        assert engine.stats()["kv_peak_bytes"] == most
        assert engine.stats()["kv_positions"] is None, "of any length"
    with Engine(model, max_batch_size=1, max_step_tokens=16, kv_policy=OPTION, kv_memory=most) as engine:
        (completion,) = engine.generate([tokens(200)], params)
        assert completion.error is None, "there is room"


def logits(prompt, words):
    model = tiny_mixtral()
    passes = Passes(model, prompt, most_new=16, policy=policy_of(OPTION, model))
    passes.begin(1)
    return passes.say(words)


def test_what_is_forgotten_has_no_part_in_the_logits():
    prompt, words = tokens(60, 1), tokens(8, 2)
    expected, place = logits(prompt, words), len(prompt) - REACH - 1
    for changed, matters in ((place, False), (place + WINDOW, True), (1, True)):
        other = [*prompt]
        other[changed] = (prompt[changed] + 50) % 120 + 3
        assert torch.equal(logits(other, words), expected) != matters, changed


def test_the_first_and_the_last_positions_are_those_that_stay():
    model, every = tiny_mixtral(num_hidden_layers=1), tokens(150, 1)
    passes = Passes(model, every, most_new=16, policy=policy_of(OPTION, model))
    plain = Passes(model, every)
    passes.begin(16)
    plain.begin(16)
    passes.runner.memory.grow(passes.sequence)
    slot, whole = passes.runner.memory["one"], plain.runner.memory["one"]
    assert slot.forgotten >= 150 - SINKS - WINDOW - 64
    kept = [*range(SINKS), *range(SINKS + slot.forgotten, 150)]
    assert set(range(150 - WINDOW + 1, 150)) <= set(kept)
    for found, expected in zip(slot.read(0, 150), whole.read(0, 150), strict=True):
        torch.testing.assert_close(found, expected[:, :, kept])


def test_a_needle_is_found_in_the_window_and_lost_between():
    params, option = SamplingParams(max_new_tokens=1), {"name": "sinks", "sinks": 4, "window": 64}
    with Engine(needle_model(), max_batch_size=1, kv_policy=option) as engine:
        for place, found in ((2, True), (40, False), (400, False), (470, True)):
            (completion,) = engine.generate([haystack(500, {place: 2})], params)
            assert completion.token_ids == [answer_of(2) if found else NO_ANSWER], place
