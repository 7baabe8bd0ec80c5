"""Streaming against plain `generate` on a tiny random Mixtral."""

import re
import threading

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer
from moeflow.chat.answer import checkpoint_params, stream_answer
from moeflow.chat.stop_flag import StopFlag
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token=EOS, pad_token="<|pad|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def input_ids(tokenizer):
    return tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]


def plain_generate(model, input_ids, **options):
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return output[0, input_ids.shape[1] :].tolist()


class Saying(torch.nn.Module):
    """In place of the lm_head: makes the model say given tokens, whatever the hidden states are."""

    def __init__(self, vocab_size, token_ids):
        super().__init__()
        self.vocab_size = vocab_size
        self.token_ids = iter(token_ids)

    def forward(self, hidden_states):
        logits = torch.zeros(*hidden_states.shape[:-1], self.vocab_size)
        logits[..., next(self.token_ids)] = 1
        return logits


@pytest.fixture
def say(model):
    lm_head = model.lm_head

    def set_tokens(token_ids):
        model.lm_head = Saying(model.config.vocab_size, token_ids)

    yield set_tokens
    model.lm_head = lm_head


def test_greedy_stream_is_what_generate_returns(model, tokenizer, input_ids):
    expected = plain_generate(model, input_ids, max_new_tokens=40, do_sample=False)
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=40))
    text = "".join(stream)
    assert text == stream.answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert stream.answer.num_prompt_tokens == input_ids.shape[1]
    assert stream.answer.num_new_tokens == 40
    assert stream.answer.stopped == "length"


def test_same_seed_gives_the_same_answer(model, tokenizer, input_ids):
    options = {"max_new_tokens": 30, "temperature": 1.5, "top_p": 0.99, "top_k": 0}
    texts = [
        "".join(stream_answer(model, tokenizer, input_ids, SamplingParams(seed=seed, **options))) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_without_sampling_arguments_the_checkpoint_decides(model, tokenizer, input_ids, monkeypatch):
    greedy = "".join(stream_answer(model, tokenizer, input_ids, checkpoint_params(model, max_new_tokens=30)))
    assert greedy == "".join(stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=30)))
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 1.5)
    torch.manual_seed(5)
    sampled = plain_generate(model, input_ids, max_new_tokens=30)
    streamed = "".join(stream_answer(model, tokenizer, input_ids, checkpoint_params(model, max_new_tokens=30, seed=5)))
    assert streamed == tokenizer.decode(sampled, skip_special_tokens=True) != greedy


def test_temperature_zero_overrides_a_sampling_checkpoint_without_a_warning(
    model, tokenizer, input_ids, monkeypatch, recwarn, caplog
):
    greedy = "".join(stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=10)))
    for name, value in {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert "".join(stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=10))) == greedy
    assert not recwarn.list
    assert not caplog.records


def test_decode_rate_counts_the_tokens_after_the_first(model, tokenizer, input_ids):
    with stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=12)) as stream:
        assert "".join(stream)
    answer = stream.answer
    assert answer.ttft_s > 0
    assert answer.tokens_per_s * answer.decode_s == pytest.approx(11)


def test_single_token_has_no_decode_rate(model, tokenizer, input_ids):
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=1))
    assert len(list(stream)) <= 1
    assert stream.answer.tokens_per_s is None
    assert stream.answer.decode_s == 0


def test_end_of_turn_named_only_by_the_tokenizer_ends_the_answer(model, tokenizer, input_ids, say, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    say([*tokenizer("Hi")["input_ids"], tokenizer.eos_token_id])
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=50))
    assert "".join(stream) == "Hi"
    assert stream.answer.stopped == "eos"
    assert stream.answer.num_new_tokens == 3


@pytest.mark.parametrize(("stop", "text"), [("i<|pad|>", "H"), ("<|pad|>", "Hi"), (["x", "Hi"], ""), ("foxHi", "")])
def test_stop_strings_of_the_checkpoint_end_the_answer_and_are_not_shown(
    model, tokenizer, input_ids, say, monkeypatch, stop, text
):
    monkeypatch.setattr(model.generation_config, "stop_strings", stop)
    say([*tokenizer("Hi<|pad|>there")["input_ids"], tokenizer.eos_token_id])
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=50))
    assert "".join(stream) == text
    assert (stream.answer.text, stream.answer.stopped) == (text, "eos")
    assert stream.answer.num_new_tokens == (3 if "<|pad|>" in stop else 2)


@pytest.mark.parametrize(("stop", "named"), [([""], "stop_strings"), (5, "5"), ([7], "7"), ({"a": 1}, "stop_strings")])
def test_stop_strings_of_the_checkpoint_that_are_no_texts_are_refused(
    model, tokenizer, input_ids, monkeypatch, stop, named
):
    monkeypatch.setattr(model.generation_config, "stop_strings", stop)
    with pytest.raises(ConfigError, match=named):
        stream_answer(model, tokenizer, input_ids, SamplingParams())


def test_stop_strings_of_the_checkpoint_that_no_token_completes_are_refused(model, input_ids, monkeypatch):
    monkeypatch.setattr(model.generation_config, "stop_strings", ["é"])
    with pytest.raises(ConfigError, match="é"):
        stream_answer(model, letter_tokenizer(), input_ids, SamplingParams())


def test_characters_of_several_tokens_arrive_whole(model, tokenizer, input_ids, say):
    text = "naïve 漢字 🙂 end"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) > len(text)
    say(token_ids)
    pieces = list(stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=len(token_ids))))
    assert pieces == list(text)


def test_cut_character_is_shown_as_a_replacement_at_the_end(model, tokenizer, input_ids, say):
    token_ids = tokenizer("a🙂")["input_ids"][:-1]
    say(token_ids)
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=len(token_ids)))
    assert "".join(stream) == tokenizer.decode(token_ids) == "a\ufffd"


def answer_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("moeflow-answer")]


def test_stop_ends_the_answer(model, tokenizer, input_ids, say):
    say(tokenizer("a" * 3000)["input_ids"])
    stop = StopFlag()
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=3000), stop=stop)
    first = next(stream)
    stop.set()
    text = first + "".join(stream)
    assert stream.answer.stopped == "user"
    assert stream.answer.text == text == "a" * stream.answer.num_new_tokens
    assert stream.answer.num_new_tokens < 3000
    assert not answer_threads()


def test_closing_early_stops_the_thread_and_keeps_the_partial_answer(model, tokenizer, input_ids, say):
    say(tokenizer("a" * 3000)["input_ids"])
    with stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=3000)) as stream:
        next(stream)
    assert not answer_threads()
    assert stream.answer.stopped == "user"
    assert stream.answer.num_new_tokens < 3000
    assert list(stream) == []


def test_dropping_the_iterator_stops_the_thread(model, tokenizer, input_ids, say):
    say(tokenizer("a" * 3000)["input_ids"])
    for _piece in stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=3000)):
        (thread,) = answer_threads()
        break
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_error_while_generating_reaches_the_consumer_after_the_text_before_it(model, tokenizer, input_ids, say):
    def three_then_fail():
        yield from tokenizer("abc")["input_ids"]
        raise OSError("the disk is gone")

    say(three_then_fail())
    stream = stream_answer(model, tokenizer, input_ids, SamplingParams(max_new_tokens=10))
    seen = [next(stream) for _ in range(3)]
    assert seen == ["a", "b", "c"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert stream.answer is None
    assert list(stream) == []
    assert not answer_threads()


def test_what_the_checkpoint_asks_for_holds_where_nothing_else_is_given(model, monkeypatch):
    for name, value in {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    held = {"max_new_tokens": 512, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    assert checkpoint_params(model) == SamplingParams(**held), "it does not sample"
    assert checkpoint_params(model, top_p=0.5) == SamplingParams(**held, temperature=0.6, top_p=0.5)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    assert checkpoint_params(model, seed=3) == SamplingParams(**held, temperature=0.6, seed=3)
    assert checkpoint_params(model, temperature=0, top_k=0) == SamplingParams(**{**held, "top_k": 0})


def test_a_given_zero_overrides_the_checkpoint_s_min_p(model, tokenizer, input_ids, monkeypatch):
    params = SamplingParams(max_new_tokens=20, temperature=1.5, seed=1)
    expected = "".join(stream_answer(model, tokenizer, input_ids, params))
    monkeypatch.setattr(model.generation_config, "min_p", 1.0)
    assert "".join(stream_answer(model, tokenizer, input_ids, params)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_follows_its_grammar_and_ends_where_nothing_may_follow(model, tokenizer, input_ids, temperature):
    params = SamplingParams(regex='\\{"name": "[a-z]{2,4}", "n": [0-9]\\}', temperature=temperature, seed=1)
    with stream_answer(model, tokenizer, input_ids, params) as stream:
        text = "".join(stream)
    assert re.fullmatch(params.regex, text)
    assert (stream.answer.text, stream.answer.stopped) == (text, "eos")
    assert stream.answer.num_new_tokens == len(text)


def test_a_bound_answer_may_be_cut_by_its_length(model, tokenizer, input_ids):
    with stream_answer(model, tokenizer, input_ids, SamplingParams(regex="[ab]{50}", max_new_tokens=9)) as stream:
        assert re.fullmatch("[ab]{9}", "".join(stream))
    assert stream.answer.stopped == "length"


def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_runs(model, tokenizer, input_ids):
    with pytest.raises(ConfigError, match="regex cannot be compiled: unclosed group"):
        stream_answer(model, tokenizer, input_ids, SamplingParams(regex="("))


def test_an_answer_of_tokens_that_the_checkpoint_suppresses_says_so(model, tokenizer, input_ids, monkeypatch):
    suppressed = tokenizer("ab")["input_ids"]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", suppressed)
    with (
        pytest.raises(MoeflowError, match="only tokens that the model does not say"),
        stream_answer(model, tokenizer, input_ids, SamplingParams(regex="[ab]c")) as stream,
    ):
        list(stream)


@pytest.mark.parametrize("shape", [(2, 3), (1, 0)])
def test_ids_that_are_no_prompt_are_refused_before_anything_runs(model, tokenizer, shape):
    with pytest.raises(ConfigError, match=re.escape(str(list(shape)))):
        stream_answer(model, tokenizer, torch.zeros(shape, dtype=torch.long), SamplingParams())
    assert not answer_threads()


@pytest.mark.parametrize("given", [{"stop": ("x",)}, {"logprobs": 0}, {"presence_penalty": 0.5}, {"ignore_eos": True}])
def test_what_only_the_engine_knows_is_refused_before_anything_runs(model, tokenizer, input_ids, given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))} is .* only the engine"):
        stream_answer(model, tokenizer, input_ids, SamplingParams(**given))
    assert not answer_threads()
