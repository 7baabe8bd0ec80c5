"""Streams and batches give each request its own text, and say why one cannot be run."""

import pytest

from helpers.engine_requests import GREEDY, PROMPTS, assert_empty
from moeflow.engine.engine import Engine
from moeflow.errors import ConfigError, MoeflowError


def test_a_stream_gives_the_text_of_the_batch_and_loses_nothing_of_others(speaking, tokenizer):
    engine = Engine(speaking, tokenizer)
    texts = ["The quick brown fox", "jumps"]
    first, second = engine.generate(texts, GREEDY)
    other = engine.add(texts[1], GREEDY)
    assert "".join(engine.stream(texts[0], GREEDY)) == first.text
    found = []
    while not engine.finished:
        found += engine.step()
    assert [token for one in found if one.id == other for token in one.token_ids] == second.token_ids
    assert "".join(one.text for one in found if one.id == other) == second.text
    half = engine.stream(texts[0], GREEDY)
    next(half)
    half.close()
    assert_empty(engine)


def test_a_stream_says_why_its_prompt_cannot_be_run(speaking, tokenizer):
    with pytest.raises(MoeflowError, match="empty"):
        list(Engine(speaking, tokenizer).stream(""))


def test_a_stream_loses_nothing_to_steps_between_its_pieces(speaking, tokenizer):
    engine = Engine(speaking, tokenizer)
    text = engine.generate(["The quick"], GREEDY)[0].text
    stream = engine.stream("The quick", GREEDY)
    first = next(stream)
    while not engine.finished:
        assert engine.step() == []
    assert first + "".join(stream) == text
    assert_empty(engine)


def test_a_batch_of_which_one_is_refused_leaves_nothing_under_way(mixtral):
    engine = Engine(mixtral)
    with pytest.raises(ConfigError, match="no tokenizer"):
        engine.generate([PROMPTS[0], "text"], GREEDY)
    with pytest.raises(ConfigError, match="NoneType"):
        engine.generate([[], None], GREEDY)
    with pytest.raises(ConfigError, match="2 params for 1 prompts"):
        engine.generate([PROMPTS[0]], [GREEDY] * 2)
    assert_empty(engine)
