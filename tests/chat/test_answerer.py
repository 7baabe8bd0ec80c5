"""Answers of an engine that keeps the conversation, and of `generate` where the model needs it."""

import threading

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.forks import in_child
from helpers.small_tokenizers import letter_tokenizer
from helpers.terminal import ENDLESS
from moeflow import load_moe
from moeflow.chat.answer import stream_answer
from moeflow.chat.answerer import Answerer
from moeflow.chat.stop_flag import StopFlag
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError

TWENTY = SamplingParams(max_new_tokens=20)


@pytest.fixture
def prompt(tokenizer):
    return tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]


def answered(stream):
    """Return the figures of an answer that is read to its end."""
    text = "".join(stream)
    assert text == stream.answer.text
    return stream.answer


def next_turn(tokenizer, prompt, answer, text=" and then"):
    return torch.cat([prompt, tokenizer(answer.text + text, return_tensors="pt")["input_ids"]], 1)


def answer_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("moeflow-answer")]


def test_a_turn_computes_only_what_is_new_and_says_what_generate_says(model, tokenizer, prompt):
    answerer = Answerer(model, tokenizer)
    first = answered(answerer.stream(prompt, TWENTY))
    turn = next_turn(tokenizer, prompt, first)
    second = answered(answerer.stream(turn, TWENTY))
    assert [first.text, second.text] == [
        answered(stream_answer(model, tokenizer, ids, TWENTY)).text for ids in (prompt, turn)
    ]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, prompt.shape[1] + 19)
    assert (second.num_prompt_tokens, second.num_new_tokens, second.stopped) == (turn.shape[1], 20, "length")
    assert second.ttft_s > 0
    assert second.tokens_per_s * second.decode_s == pytest.approx(19)
    assert not answer_threads()


def test_what_only_the_engine_knows_holds(model, tokenizer, prompt):
    answerer = Answerer(model, tokenizer)
    text = answered(answerer.stream(prompt, TWENTY)).text
    stopped = answered(answerer.stream(prompt, SamplingParams(max_new_tokens=20, stop=(text[5:8],))))
    assert (stopped.text, stopped.stopped) == (text[: text.index(text[5:8])], "eos")
    penalized = answered(answerer.stream(prompt, SamplingParams(max_new_tokens=20, presence_penalty=2.0)))
    assert penalized.text != text


def test_suppressed_tokens_of_the_checkpoint_hold_and_what_generate_has_not_is_refused(model, tokenizer, prompt):
    said = answered(Answerer(model, tokenizer).stream(prompt, TWENTY)).text
    model.generation_config.suppress_tokens = tokenizer(said[0])["input_ids"]
    answerer = Answerer(model, tokenizer)
    assert said[0] not in answered(answerer.stream(prompt, TWENTY)).text
    with pytest.raises(ConfigError, match="stop is"):
        answerer.stream(prompt, SamplingParams(stop=("x",)))


def test_a_recorded_trace_gets_its_passes_from_generate(folder, tokenizer, prompt, tmp_path):
    model = load_moe(folder, trace=tmp_path / "t.trace")
    with model.moeflow:
        answer = answered(Answerer(model, tokenizer).stream(prompt, TWENTY))
    assert answer.num_new_tokens == 20


def test_a_family_that_runs_one_sequence_at_a_time_keeps_its_conversation():
    model, tokenizer = build_model(FAMILIES["qwen3_next"]), letter_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[95:] = 0  # it says letters
    answerer, prompt, six = Answerer(model, tokenizer), tokenizer("hello", return_tensors="pt")["input_ids"], 6
    first = answered(answerer.stream(prompt, SamplingParams(max_new_tokens=six)))
    second = answered(answerer.stream(next_turn(tokenizer, prompt, first), SamplingParams(max_new_tokens=six)))
    assert second.num_cached_tokens == prompt.shape[1] + 5


@pytest.mark.parametrize("end", ["event", "close", "drop"])
def test_an_answer_that_is_ended_leaves_the_engine_to_the_next(model, tokenizer, prompt, end):
    answerer, stop = Answerer(model, tokenizer), StopFlag()
    stream = answerer.stream(prompt, SamplingParams(max_new_tokens=ENDLESS), stop=stop)
    next(stream)
    if end == "event":
        stop.set()
        list(stream)
    elif end == "close":
        stream.close()
    if end != "drop":
        assert stream.answer.stopped == "user"
        assert 1 <= stream.answer.num_new_tokens < ENDLESS
        assert not answer_threads()
    del stream
    again = answered(answerer.stream(prompt, TWENTY))
    assert (again.num_new_tokens, again.num_cached_tokens) == (20, prompt.shape[1] - 1)


def test_a_request_that_fails_raises_its_reason(model, tokenizer):
    too_long = torch.zeros(1, 2 * ENDLESS + 1, dtype=torch.long)
    stream = Answerer(model, tokenizer).stream(too_long, TWENTY)
    with pytest.raises(MoeflowError, match="context"):
        next(stream)
    assert not answer_threads()


def test_a_fork_answers_by_itself(model, tokenizer, prompt):
    answerer = Answerer(model, tokenizer)
    text = answered(answerer.stream(prompt, TWENTY)).text

    def child():
        assert answered(answerer.stream(prompt, TWENTY)).text == text

    assert in_child(child) == 0
    assert answered(answerer.stream(prompt, TWENTY)).num_cached_tokens == prompt.shape[1] - 1


def test_a_fork_in_the_middle_of_an_answer_answers_by_itself(model, tokenizer, prompt):
    answerer = Answerer(model, tokenizer)
    with answerer.stream(prompt, SamplingParams(max_new_tokens=ENDLESS)) as stream:
        next(stream)

        def child():
            assert answered(answerer.stream(prompt, TWENTY)).num_new_tokens == 20

        assert in_child(child) == 0
