"""The tokens of generate(), whatever runs beside them and however prompts are cut."""

from dataclasses import replace
from random import Random

import pytest
import torch

from helpers.engine_requests import GREEDY, NEW, PROMPTS, answers, assert_empty, generated
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import letter_tokenizer
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError

pytestmark = pytest.mark.slow

IN_EVERY_WAY = ("mixtral", "deepseek_v3", "gpt_oss", "gemma4")  # plain, latent, sinks, two shapes and shared keys
WITHOUT_GENERATE = {"qwen3_omni_moe"}  # its config lacks what generate() asks for
REFUSED = {  # family: what the message names
    "axk2": "DynamicIndexedLayer",
    "bailing_hybrid": "LinearAttentionLayer",
    "deepseek_v32": "DynamicIndexedLayer",
    "deepseek_v4": "DeepseekV4CSACache",
    "diffusion_gemma": "one token alone",
    "dots3_note": "DynamicIndexedLayer",
    "glm5_next": "LinearAttentionLayer",
    "glm_moe_dsa": "DynamicIndexedLayer",
    "granitemoehybrid": "LinearAttentionLayer",
    "hy_v4": "DynamicIndexedLayer",
    "inkling": "LinearAttentionAndSlidingWindowAttentionLayer",
    "inkling2": "LinearAttentionAndSlidingWindowAttentionLayer",
    "jamba": "LinearAttentionLayer",
    "kimi_linear": "LinearAttentionLayer",
    "lfm2_moe": "LinearAttentionLayer",
    "minimax": "LinearAttentionLayer",
    "mistral_large4": "DynamicIndexedLayer",
    "nemotron_h": "LinearAttentionLayer",
    "openai_privacy_filter": "not a decoder",
    "qwen3_5_moe": "LinearAttentionLayer",
    "qwen3_next": "LinearAttentionLayer",
    "qwen4_exp": "DynamicIndexedLayer",
    "unlimited_ocr": "ReferenceSlidingWindowLayer",
    "zaya": "LinearAttentionAndFullAttentionLayer",
}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REFUSED.keys() - WITHOUT_GENERATE))
def test_greedy_tokens_are_those_of_generate(name):
    torch.set_num_threads(1)
    model = build_model(FAMILIES[name])
    before = model.config._attn_implementation
    with Engine(model, max_batch_size=4, max_step_tokens=7) as engine:
        found = answers(engine)
        assert engine.stats()["shared_tokens"] > 0
        assert_empty(engine)
    assert model.config._attn_implementation == before
    assert found == [generated(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_tokens_depend_neither_on_pieces_nor_on_sharing_nor_on_who_runs_beside(name):
    model = build_model(FAMILIES[name])
    found = []
    for batch, budget, share in ((1, 1, False), (2, 5, False), (4, 512, True), (6, 512, False)):
        with Engine(model, max_batch_size=batch, max_step_tokens=budget, share_prefixes=share) as engine:
            found.append(answers(engine))
            assert (engine.stats()["shared_tokens"] > 0) == share
    assert found == [found[0]] * 4


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_give_the_tokens_of_generate(mixtral, expected, implementation, window):
    model = tiny_mixtral(attn_implementation=implementation, sliding_window=window)
    model.load_state_dict(mixtral.state_dict())
    with Engine(model, max_step_tokens=32, max_batch_size=3) as engine:
        assert answers(engine) == [generated(model, prompt) for prompt in PROMPTS]
        assert engine.stats()["shared_tokens"] > 0
    assert (answers(Engine(model)) == expected) == (window is None), "the window cuts nothing here"


def test_the_end_token_ends_an_answer_unless_it_is_to_be_ignored(mixtral, expected, monkeypatch):
    end = expected[1][3]
    monkeypatch.setattr(mixtral.generation_config, "eos_token_id", [end])
    with Engine(mixtral) as engine:
        stopping, ignoring = engine.generate([PROMPTS[1]] * 2, [SamplingParams(max_new_tokens=NEW), GREEDY])
    assert (stopping.finish_reason, ignoring.finish_reason) == ("stop", "length")
    assert stopping.token_ids == expected[1][: expected[1].index(end) + 1]
    assert ignoring.token_ids == expected[1]


def test_the_end_of_turn_that_only_the_tokenizer_names_ends_an_answer(speaking, tokenizer, monkeypatch):
    with Engine(speaking, tokenizer) as engine:
        first = engine.generate([PROMPTS[2]], GREEDY)[0].token_ids
    monkeypatch.setattr(type(tokenizer), "eos_token_id", first[3], raising=False)
    with Engine(speaking, tokenizer) as engine:
        done = engine.generate([PROMPTS[2]], SamplingParams(max_new_tokens=NEW))[0]
    assert done.finish_reason == "stop"
    assert done.token_ids == first[: first.index(first[3]) + 1]


def test_a_stop_string_ends_the_answer_before_it(speaking, tokenizer):
    engine = Engine(speaking, tokenizer)
    (whole,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=24, ignore_eos=True))
    stop = whole.text[5:8]
    (cut,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=24, ignore_eos=True, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert "".join(engine.stream("The quick", SamplingParams(max_new_tokens=24, stop=(stop,)))) == cut.text


def test_stop_strings_end_an_answer_at_the_token_where_those_of_generate_do():
    letters = letter_tokenizer()
    model = tiny_mixtral(vocab_size=len(letters))
    inputs = letters("The quick", return_tensors="pt")
    engine, options = Engine(model, letters), {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20}
    (whole,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=20))
    ends = set()
    for begin, length in ((2, 1), (4, 2), (7, 3), (12, 4)):
        stop = whole.text[begin : begin + length]
        out = model.generate(**inputs, stop_strings=[stop], tokenizer=letters, **options)[0, 9:].tolist()
        (cut,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=20, stop=(stop,)))
        assert (cut.token_ids, cut.finish_reason) == (out, "stop")
        assert cut.text == whole.text[: whole.text.find(stop)]
        ends.add(len(out))
    assert len(ends) > 2
    (begun,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=20, stop=(whole.text[-2:] + "!",)))
    assert (begun.text, begun.finish_reason) == (whole.text, "length"), "the beginning of a stop string is text"


def test_stop_strings_with_special_tokens_end_an_answer_where_those_of_generate_do():
    letters = letter_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    model = tiny_mixtral(vocab_size=len(letters))
    model.lm_head.weight.data[-2:] *= 2  # special tokens are likely
    inputs = letters("The quick", return_tensors="pt")
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}
    written = letters.decode(model.generate(**inputs, **options)[0])
    assert "<|im_end|>" in written[9:] or "<|im_start|>" in written[9:]
    choice = Random(0)
    with Engine(model, letters) as engine:
        ends = set()
        for _ in range(40):
            begins = [choice.randrange(len(written)) for _ in range(choice.randint(1, 2))]
            stop = tuple(written[begin : begin + choice.choice((1, 3, 9, 16))] for begin in begins)
            out = model.generate(**inputs, stop_strings=list(stop), tokenizer=letters, **options)[0, 9:].tolist()
            (cut,) = engine.generate(["The quick"], SamplingParams(max_new_tokens=24, stop=stop))
            assert cut.token_ids == out
            text = letters.decode(out, skip_special_tokens=True)
            assert text.startswith(cut.text)
            assert cut.finish_reason == "stop" or cut.text == text
            ends.add(len(out))
    assert len(ends) > 5


def test_the_stop_strings_of_the_checkpoint_hold_where_a_request_names_none(speaking, tokenizer, monkeypatch):
    with Engine(speaking, tokenizer) as engine:
        whole = engine.generate([PROMPTS[2]], GREEDY)[0].text
    monkeypatch.setattr(speaking.generation_config, "stop_strings", [whole[3:5]])
    with Engine(speaking, tokenizer) as engine:
        own = replace(GREEDY, stop=("never said",))
        cut, other = engine.generate([PROMPTS[2]] * 2, [GREEDY, own])
    assert (cut.text, cut.finish_reason, other.text) == (whole[: whole.find(whole[3:5])], "stop", whole)
    with pytest.raises(ConfigError, match="tokenizer"):
        Engine(speaking)


@pytest.mark.parametrize("max_step_tokens", [4, 512])
def test_logprobs_of_a_prompt_are_those_of_one_pass_over_it(mixtral, max_step_tokens):
    with torch.no_grad():
        logprobs = mixtral(torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True, prompt_logprobs=2)
    with Engine(mixtral, max_batch_size=4, max_step_tokens=max_step_tokens) as engine:
        # The others begin with the same tokens, whose keys and values this prompt must not take from them.
        *_, completion = engine.generate([*PROMPTS, PROMPTS[1]], [GREEDY] * len(PROMPTS) + [params])
    assert completion.prompt_logprobs is not None
    assert completion.prompt_logprobs[0] is None
    for place, (logprob, top) in enumerate(completion.prompt_logprobs[1:]):
        assert logprob == pytest.approx(float(logprobs[place, PROMPTS[1][place + 1]]), abs=1e-4)
        assert [value for _, value in top] == pytest.approx(logprobs[place].topk(2).values.tolist(), abs=1e-4)
        assert [token for token, _ in top] == logprobs[place].topk(2).indices.tolist()


def test_logprobs_are_those_of_the_logits_of_generate(mixtral):
    prompt = PROMPTS[2]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = mixtral.generate(torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True, logprobs=3)
    completion = Engine(mixtral).generate([PROMPTS[1], prompt], [GREEDY, params])[1]
    for token, (logprob, top), logits in zip(completion.token_ids, completion.logprobs, out.logits, strict=True):
        likeliest = logits[0].log_softmax(-1).topk(3)
        assert [id for id, _ in top] == likeliest.indices.tolist()
        assert [value for _, value in top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        assert (token, logprob) == top[0]


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(mixtral):
    params = SamplingParams(max_new_tokens=NEW, temperature=1.0, seed=7, logprobs=2, ignore_eos=True)
    with Engine(mixtral, share_prefixes=False) as engine:
        (alone,) = engine.generate([PROMPTS[2]], params)
        together = engine.generate(PROMPTS, params)[2]
    assert together.token_ids == alone.token_ids != generated(mixtral, PROMPTS[2])
    assert [len(top) for _, top in together.logprobs] == [2] * NEW
