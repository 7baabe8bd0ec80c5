"""Answers of an engine under schemas: they validate, and are the same with and without the jump over forced tokens."""

import json
import re

import jsonschema
import pytest

from helpers.rope_models import ORIGINAL, rope_model
from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import byte_tokenizer
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.structure.grammars import grammars_of
from moeflow.errors import ConfigError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 200},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "home", "ok"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -9, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
PROMPT = [5, 6, 7]


def answers(model, tokenizer, each, **options):
    with Engine(model, tokenizer, **options) as engine:
        completions = engine.generate([PROMPT] * len(each), each)
        engine.check_integrity()
        return completions, engine.stats()


def found(completions):
    return [(one.token_ids, one.text, one.finish_reason, one.error) for one in completions]


def with_and_without_jump(model, tokenizer, each, **options):
    """Return completions with the jump, after a look at those without."""
    jumped, stats = answers(model, tokenizer, each, **options)
    plain, plain_stats = answers(model, tokenizer, each, jump_forward=False, **options)
    assert found(jumped) == found(plain)
    assert stats["new_tokens"] == plain_stats["new_tokens"]
    assert stats["prompt_tokens"] + stats["shared_tokens"] == len(PROMPT) * len(each)
    return jumped, stats, plain_stats


def random_params(seeds, **options):
    options = {"json_schema": PERSON, "temperature": 1.0, "max_new_tokens": 200, **options}
    return [SamplingParams(seed=seed, **options) for seed in seeds]


@pytest.mark.slow
def test_two_hundred_random_answers_validate(model, either):
    completions, _ = answers(model, either, random_params(range(200)))
    ended = [one for one in completions if one.finish_reason == "stop"]
    assert len(ended) > 150
    for one in ended:
        jsonschema.validate(json.loads(one.text), PERSON)
    assert len({one.text for one in ended}) > 150
    assert {one.finish_reason for one in completions} <= {"stop", "length"}


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 3, "max_step_tokens": 5}], ids=["together", "in turn"])
def test_answers_are_the_same_with_the_jump_in_fewer_passes(model, either, options):
    each = [*random_params(range(6)), *random_params(range(1), temperature=0.0, max_new_tokens=60)]
    completions, stats, plain_stats = with_and_without_jump(model, either, each, **options)
    assert stats["steps"] < plain_stats["steps"]
    assert len({one.text for one in completions}) == 7


def test_forced_tokens_and_the_end_cost_no_pass(model, either):
    each = [SamplingParams(regex='\\{"name": "[xy]", "number": 5\\}')]
    (completion,), stats = answers(model, either, each)
    assert re.fullmatch(each[0].regex, completion.text)
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] != either.eos_token_id
    assert stats["steps"] < 6 < len(completion.token_ids)  # one for the forced beginning, one for the letter, the rest


@pytest.mark.parametrize("length", [1, 3, 9, 20])
def test_the_greatest_length_ends_an_answer_among_forced_tokens(model, either, length):
    each = [SamplingParams(regex='\\{"name": "[xy]", "number": 5\\}', max_new_tokens=length)]
    (completion,), _, _ = with_and_without_jump(model, either, each)
    (whole,), _ = answers(model, either, [SamplingParams(regex=each[0].regex)])
    assert completion.token_ids == whole.token_ids[:length]
    assert completion.finish_reason == ("length" if length < len(whole.token_ids) else "stop")


@pytest.mark.parametrize("stop", ["name", '": ', "5}"])
def test_a_stop_string_ends_an_answer_among_forced_tokens(model, either, stop):
    each = [SamplingParams(regex='\\{"name": "[xy]", "number": 5\\}', stop=(stop,))]
    (completion,), _, _ = with_and_without_jump(model, either, each)
    (whole,), _ = answers(model, either, [SamplingParams(regex=each[0].regex)])
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert completion.finish_reason == "stop"


def test_the_model_may_end_where_the_grammar_may(model, either):
    each = random_params(range(40), json_schema=None, regex="[ab]+", max_new_tokens=400)
    completions, _ = answers(model, either, each)
    for one in completions:
        assert re.fullmatch("[ab]*", one.text)
        assert (one.token_ids[-1] == either.eos_token_id) == (one.finish_reason == "stop")
    assert {one.finish_reason for one in completions} >= {"stop"}


def test_with_ignore_eos_an_answer_ends_where_nothing_may_follow(model, either):
    completions, _ = answers(
        model, either, random_params(range(8), json_schema=None, regex="[ab]{1,30}", ignore_eos=True)
    )
    assert [(len(one.text), one.finish_reason) for one in completions] == [(30, "stop")] * 8


def test_penalties_and_biases_choose_among_the_allowed_tokens(model, bytewise):
    a, b, c = bytewise("abc")["input_ids"]
    options = {"regex": "[ab]{12}", "max_new_tokens": 20}
    each = [
        SamplingParams(**options, logit_bias={a: 100, c: 100}),
        SamplingParams(**options, logit_bias={a: -100}),
        SamplingParams(**options, frequency_penalty=100.0),
        SamplingParams(**options, temperature=1.0, seed=1, top_k=1, logit_bias={c: 100, b: 50}),
        SamplingParams(**options, temperature=1.0, seed=1, top_p=0.01, logit_bias={c: 100, b: 50}),
    ]
    completions, _, _ = with_and_without_jump(model, bytewise, each)
    texts = [one.text for one in completions]
    assert texts[:2] == ["a" * 12, "b" * 12]
    assert texts[2].count("a") == 6
    assert texts[3:] == ["b" * 12] * 2


def test_logprobs_are_the_model_s_own_of_every_token(model, bytewise):
    bound = SamplingParams(regex="[ab]\\.\\.\\.[ab]", logprobs=1)
    (completion,), stats = answers(model, bytewise, [bound])
    (plain,), jumped = answers(model, bytewise, [SamplingParams(regex=bound.regex)])
    assert completion.token_ids == plain.token_ids
    assert stats["steps"] == 5 > jumped["steps"]
    assert len(completion.logprobs) == 5
    assert all(logprob < -3 for logprob, _ in completion.logprobs)  # one token of 384, however few are allowed
    assert any(top[0][0] not in completion.token_ids for _, top in completion.logprobs)


def test_an_answer_that_is_computed_anew_keeps_its_place_in_the_grammar(model, either):
    """As after a preemption: all keys and values of a running sequence are computed again."""
    each = random_params(range(3))
    expected, _ = answers(model, either, each)
    completions = {}
    with Engine(model, either) as engine:
        ids = [engine.add(PROMPT, one) for one in each]
        for number in range(400):
            if number % 3 == 2:
                for sequence in engine._scheduler.running:
                    sequence.num_computed = 0
            for output in engine.step():
                if output.completion is not None:
                    completions[output.id] = output.completion
            if engine.finished:
                break
    assert found(completions[id] for id in ids) == found(expected)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_no_jump_crosses_a_length_at_which_the_model_scales_anew(rope):
    """Dynamic NTK scales each length beyond the original its own way, LongRoPE all of them alike."""
    each = [SamplingParams(regex="([a-z]-----){40}", temperature=1.0, seed=0, max_new_tokens=2 * ORIGINAL)]
    tokenizer = byte_tokenizer()  # printable letters are its first tokens
    with_and_without_jump(rope_model(rope), tokenizer, each)
    with Engine(rope_model(rope), tokenizer) as engine:
        engine.add(PROMPT, each[0])
        ends, length = [], len(PROMPT)  # of the tokens of each step
        while not engine.finished:
            length += sum(len(output.token_ids) for output in engine.step())
            ends.append(length)
    beyond = [end for end in ends if end > ORIGINAL]
    assert ORIGINAL in ends
    assert len(ends) - len(beyond) < ORIGINAL / 2
    assert (beyond == list(range(ORIGINAL + 1, length + 1))) == (rope == "dynamic")


def test_requests_share_one_compiled_grammar(model, bytewise):
    schema = {"type": "object", "properties": {"shared": {"enum": [1, 2]}}, "required": ["shared"]}
    grammars = grammars_of(bytewise, (bytewise.eos_token_id,))
    before = grammars.num_compiled
    answers(model, bytewise, random_params(range(5), json_schema=schema, max_new_tokens=5))
    assert grammars.num_compiled == before + 1


def test_outputs_of_steps_add_up_to_the_answer(model, either):
    tokens, text = [], ""
    with Engine(model, either) as engine:
        engine.add(PROMPT, random_params([3])[0])
        while not engine.finished:
            for output in engine.step():
                tokens += output.token_ids
                text += output.text
                completion = output.completion
    assert (tokens, text) == (completion.token_ids, completion.text)


def test_a_grammar_that_no_token_can_go_on_with_ends_its_request_alone(bytewise):
    small = tiny_mixtral(vocab_size=120)  # fewer logits than the tokenizer has tokens: none for most bytes of ü
    small.generation_config.eos_token_id = None
    each = [SamplingParams(regex="[a-z][üé]x"), SamplingParams(regex="[ab]x")]
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "seed": 0}
        completions, _ = answers(small, bytewise, [SamplingParams(regex=one.regex, **options) for one in each])
        assert completions[0].finish_reason == "error"
        assert "no token could be chosen" in completions[0].error
        assert completions[1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"regex": "a(b"}, "regex cannot be compiled: unclosed group"),
        ({"logit_bias": {384: 1}}, "logit_bias has 384, which is no token id: they are 0 to 383"),
    ],
)
def test_what_cannot_be_bound_is_refused_when_it_is_added_and_others_go_on(model, bytewise, params, told):
    with Engine(model, bytewise) as engine:
        engine.add(PROMPT, SamplingParams(regex="ab"), id="other")
        with pytest.raises(ConfigError, match=told):
            engine.add(PROMPT, SamplingParams(**params), id="bad")
        outputs = engine.step()
        assert outputs[-1].completion.text == "ab"
        assert engine.finished
        engine.check_integrity()


def test_an_engine_without_a_tokenizer_says_what_is_missing(model):
    with Engine(model) as engine, pytest.raises(ConfigError, match="no tokenizer, which json_schema needs"):
        engine.add(PROMPT, SamplingParams(json_schema={}))
