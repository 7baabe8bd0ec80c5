"""What an engine may take: tokens a step, bytes of keys and values, positions of the context."""

import pytest
import torch

from helpers.engine_requests import GREEDY, NEW, POSITION_BYTES, PROMPTS, answers, assert_empty, generated, tokens
from helpers.small_models import tiny_mixtral
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError


def test_a_step_has_every_decoding_sequence_and_no_more_tokens_than_allowed(mixtral):
    engine = Engine(mixtral, max_batch_size=4, max_step_tokens=9)
    widths = []
    hook = mixtral.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for prompt in PROMPTS:
            engine.add(prompt, GREEDY)
        decoding = set()
        while not engine.finished:
            progress = engine.step()
            assert decoding <= {one.id for one in progress}
            decoding |= {one.id for one in progress}
            decoding -= {one.id for one in progress if one.completion}
            engine.check_integrity()
    finally:
        hook.remove()
    assert max(widths) == 9
    assert sum(widths) == sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1) - engine.stats()["shared_tokens"]


def test_budgets_that_hold_only_some_sequences_make_the_others_wait(mixtral, expected):
    with Engine(mixtral) as engine:
        position = engine.stats()["kv_position_bytes"]
        assert engine.stats()["kv_budget_bytes"] == 32 * 256 * position, "as much as all can come to have"
    assert position == POSITION_BYTES
    longest = max(map(len, PROMPTS)) + NEW - 1
    with Engine(mixtral, kv_memory=longest * position, max_step_tokens=32) as engine:
        assert answers(engine) == expected
        assert engine.stats()["kv_peak_bytes"] <= longest * position
        assert_empty(engine)


def test_what_cannot_run_ends_with_its_reason_and_all_others_go_on(mixtral, expected):
    with Engine(mixtral) as engine:
        position = engine.stats()["kv_position_bytes"]
    with Engine(mixtral, kv_memory=40 * position) as engine:
        bad = [[], tokens(257), [5, 128], [5, -1], tokens(40)]
        completions = engine.generate([*bad, *PROMPTS], GREEDY)
        errors = [completion.error for completion in completions[: len(bad)]]
        assert "empty" in errors[0]
        assert "257 tokens" in errors[1]
        assert "256 positions" in errors[1]
        assert "128" in errors[2]
        assert "-1" in errors[3]
        assert f"{47 * position:,} bytes" in errors[4]
        assert f"kv_memory is {40 * position:,} bytes" in errors[4]
        assert {completion.finish_reason for completion in completions[: len(bad)]} == {"error"}
        assert [completion.token_ids for completion in completions[len(bad) :]] == expected
        assert_empty(engine)


def test_logits_that_nothing_can_be_drawn_from_fail_alone(mixtral, expected):
    model = tiny_mixtral()
    model.load_state_dict(mixtral.state_dict())
    model.model.embed_tokens.weight.data[125] = torch.nan
    drawn = SamplingParams(max_new_tokens=NEW, temperature=1.0, seed=0)
    with Engine(model) as engine:
        first, broken, last = engine.generate([PROMPTS[0], [5, 125], PROMPTS[2]], [GREEDY, drawn, GREEDY])
        assert broken.finish_reason == "error"
        assert "no token could be chosen" in broken.error
        assert (first.token_ids, last.token_ids) == (expected[0], expected[2])
        assert_empty(engine)


def test_a_prompt_that_fills_the_context_gets_one_token(mixtral):
    prompt = tokens(256)
    with Engine(mixtral) as engine:
        (completion,) = engine.generate([prompt], GREEDY)
    assert completion.finish_reason == "length"
    assert completion.token_ids == generated(mixtral, prompt, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_step_tokens": 1.5}, "max_step_tokens=1.5"),
        ({"max_step_tokens": 8}, "max_batch_size=32"),
        ({"kv_memory": "25%"}, "share of nothing"),
        ({"kv_memory": "much"}, "kv_memory='much'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(mixtral, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(mixtral, **options)


def test_text_without_a_tokenizer_is_refused(mixtral):
    engine = Engine(mixtral)
    with pytest.raises(ConfigError, match="no tokenizer"):
        engine.add("text", GREEDY)
    with pytest.raises(ConfigError, match="no tokenizer"):
        engine.add([5], SamplingParams(stop=("end",)))
