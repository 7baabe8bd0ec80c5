"""An engine for texts and a serial one for images on one model: each request's answer is the one it has alone."""

from dataclasses import replace

import pytest

from helpers.vision_models import picture, vision_model
from moeflow import Engine, SamplingParams
from moeflow.engine.serial.choose_engine import engine_with_images_for
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import ClosedModelError, ConfigError
from moeflow.hf.vision.image_prompt import encode_with_images

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
TEXT = list(range(30, 60))


@pytest.fixture(scope="module")
def vision():
    return vision_model("qwen3_vl_moe")


@pytest.fixture
def prompt(vision):
    parts = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "see"}]
    return encode_with_images(vision[1], [{"role": "user", "content": parts}])


def run(engine):
    """Step until all have ended; returns completions by id."""
    ended = {}
    while not engine.finished:
        ended |= {one.id: one.completion for one in engine.step() if one.completion is not None}
    return ended


def test_a_text_goes_on_with_its_own_positions_after_a_prompt_with_images(vision, prompt):
    model, processor = vision
    with Engine(model, processor.tokenizer) as fresh, SerialEngine(model, processor.tokenizer) as engine:
        for other in (TEXT[::-1], [*TEXT[:9:-1], 70, 71, 72]):
            engine.generate([other], PARAMS)  # by the second it is known how several tokens go on
        (first,) = engine.generate([TEXT], PARAMS)
        engine.add_with_images(prompt.token_ids, prompt.images, PARAMS, id="seen")
        assert run(engine)["seen"].finish_reason == "length"
        turns = TEXT + first.token_ids + [33, 34, 35]
        (second,) = engine.generate([turns], replace(PARAMS, logprobs=1))
        (expected,) = fresh.generate([turns], replace(PARAMS, logprobs=1))
        engine.check_integrity()
    assert second.cached_tokens == len(TEXT) + 5
    assert second.token_ids == expected.token_ids
    found, told = ([chosen for chosen, _ in one.logprobs] for one in (second, expected))
    assert found == pytest.approx(told, abs=1e-4)


def test_both_engines_take_turns_and_are_counted_cancelled_and_closed_together(vision, prompt):
    model, processor = vision
    engine = engine_with_images_for(model, processor.tokenizer, kv_memory="1MiB")
    for number in range(2):
        engine.add(TEXT, PARAMS, id=f"text {number}")
        engine.add(prompt.token_ids, PARAMS, id=f"seen {number}", images=prompt.images)
    begun = {output.id for _ in range(2) for output in engine.step()}
    assert {"text 0", "seen 0"} <= begun, "each engine had a turn"
    assert engine.cancel("seen 1")
    assert not engine.cancel("seen 2")
    ended = run(engine)
    assert {id: one.finish_reason for id, one in ended.items()} == {
        "text 0": "length", "text 1": "length", "seen 0": "length", "seen 1": "cancelled",
    }  # fmt: skip
    stats = engine.stats()
    assert stats["finished"] == {"stop": 0, "length": 3, "cancelled": 1, "error": 0}
    assert stats["kv_budget_bytes"] <= 1 << 20
    assert stats["kv_kept_bytes"] > 0
    engine.close()
    with pytest.raises(ClosedModelError):
        engine.step()


def test_log_probabilities_of_a_prompt_with_images_are_refused(vision, prompt):
    with SerialEngine(vision[0], vision[1].tokenizer) as engine, pytest.raises(ConfigError, match="has images"):
        engine.add_with_images(prompt.token_ids, prompt.images, SamplingParams(prompt_logprobs=1))


def test_a_prompt_beyond_the_context_ends_with_an_error_and_nothing_is_left(vision, prompt):
    with SerialEngine(vision[0], vision[1].tokenizer) as engine:
        ids = prompt.token_ids * 40
        engine.add_with_images(ids, prompt.images, PARAMS, id="long")
        assert run(engine)["long"].finish_reason == "error"
        engine.check_integrity()
