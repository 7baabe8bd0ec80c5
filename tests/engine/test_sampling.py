"""Sampling against transformers' own logits processors."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moeflow.engine.engine import Engine
from moeflow.engine.sampling import Sampler, biased, filtered, penalized
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError

VOCAB = 211
PROMPT, ANSWER = [3, 5, 5, 9], [5, 7, 7, 7, 200]


def random_logits(seed, dtype=torch.float32):
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)


def transformers_scores(logits, prompt_ids, token_ids, options):
    """Apply the processors that `generate` makes, in its order; it makes none for a top_p of 1."""
    processors = [RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
    processors.append(TemperatureLogitsWarper(options.get("temperature", 1.0)))
    for name, processor in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options and (name, options[name]) != ("top_p", 1.0):
            processors.append(processor(options[name]))
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([prompt_ids + token_ids], dtype=torch.long), scores)
    return scores[0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.9},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 0.6, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
)
def test_every_filter_gives_the_scores_of_transformers(options):
    params = SamplingParams(**{"temperature": 1.0, **options})
    for seed in range(20):
        logits = random_logits(seed)
        scores = filtered(penalized(logits, params, PROMPT, ANSWER), params)
        assert torch.equal(scores, transformers_scores(logits, PROMPT, ANSWER, options))


@settings(max_examples=150, deadline=None)
@example(seed=0, repetition_penalty=1.0, temperature=0.203125, top_k=207, top_p=1.0, min_p=0.0)
@given(
    seed=st.integers(0, 1000),
    repetition_penalty=st.floats(0.5, 2),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(1, 2 * VOCAB),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_all_filters_together_give_the_scores_of_transformers(seed, **options):
    params, logits = SamplingParams(**options), random_logits(seed)
    scores = filtered(penalized(logits, params, PROMPT, ANSWER), params)
    assert torch.equal(scores, transformers_scores(logits, PROMPT, ANSWER, options))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 63, 64, 65, 1000, 40_000]),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 5, 64, 100_000]),
    top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.05]),
)
def test_of_rounded_logits_the_same_values_stay_as_with_transformers(seed, size, **options):
    """Many are equal; of those at the border of a nucleus others may stay, but as many."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator).mul(4).bfloat16().float()
    logits[torch.randint(size, (size // 3,), generator=generator)] = -math.inf
    wanted = {name: value for name, value in options.items() if (name, value) != ("top_k", 0)}
    scores = filtered(logits, SamplingParams(**options))
    assert torch.equal(scores.sort().values, transformers_scores(logits, [], [], wanted).sort().values)


@torch.no_grad()
def sampled_alone(model, prompt, num_new, *, temperature, presence_penalty=0, frequency_penalty=0, seed=0, **options):
    """Sample one sequence with transformers' processors, and OpenAI's formula for the two penalties it has not."""
    token_ids, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(num_new):
        logits = model(torch.tensor([prompt + token_ids])).logits[0, -1]
        counts = torch.bincount(torch.tensor(token_ids, dtype=torch.long), minlength=len(logits))
        logits = logits - frequency_penalty * counts - presence_penalty * (counts > 0)
        scores = transformers_scores(logits, prompt, token_ids, {**options, "temperature": temperature or 1.0})
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        token_ids.append(int(drawn if temperature else scores.argmax()))
    return token_ids


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"max_batch_size": 3, "max_step_tokens": 5}], ids=["together", "in turn"])
def test_each_request_of_a_batch_is_sampled_as_transformers_samples_it_alone(mixtral, limits):
    num_new, drawn = 10, {"temperature": 2.0, "seed": 3}
    each = [
        {"temperature": 0},
        drawn,
        {**drawn, "seed": 4},
        {**drawn, "temperature": 0.9},
        {**drawn, "top_k": 2},
        {**drawn, "top_p": 0.3},
        {**drawn, "min_p": 0.3},
        {"temperature": 0, "repetition_penalty": 0.3},
        {"temperature": 0, "presence_penalty": -4.0},
        {"temperature": 0, "frequency_penalty": -9.0},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4, "seed": 5},
    ]
    prompt = [5, 77, 30, 5, 91, 8, 12]
    params = [SamplingParams(max_new_tokens=num_new, ignore_eos=True, **options) for options in each]
    with Engine(mixtral, **limits) as engine:
        found = [completion.token_ids for completion in engine.generate([prompt] * len(each), params)]
    assert found == [sampled_alone(mixtral, prompt, num_new, **options) for options in each]
    assert len({tuple(token_ids) for token_ids in found}) == len(each), "a parameter changed nothing"


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_p": 0.25}, {"top_k": 2}, {"min_p": 1.0}])
def test_of_equally_likely_tokens_as_many_are_kept_as_transformers_keeps(options):
    params = SamplingParams(temperature=1.0, **options)
    kept = filtered(torch.zeros(8), params).isfinite().sum()
    assert kept == transformers_scores(torch.zeros(8), [], [], options).isfinite().sum()


def test_presence_counts_once_and_frequency_as_often_as_in_the_answer():
    logits = random_logits(0)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    for token_id, times in {5: 1, 7: 3, 200: 1}.items():
        expected[token_id] -= 0.5 + 0.25 * times
    assert torch.allclose(penalized(logits, params, PROMPT, ANSWER), expected)


def test_tokens_beyond_the_logits_are_not_penalised():
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0)
    logits = random_logits(0)
    assert torch.equal(penalized(logits, params, [VOCAB], [VOCAB + 7]), logits)


def test_sampling_leaves_the_logits_as_they_were():
    logits = random_logits(1)
    before = logits.clone()
    params = SamplingParams(
        temperature=0.8, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=1.0, logprobs=2, seed=1
    )
    Sampler(params).sample(logits, PROMPT, ANSWER)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_likeliest_token_and_of_equals_the_first(dtype):
    logits = random_logits(2, dtype)
    assert Sampler(SamplingParams()).sample(logits, PROMPT, ANSWER).token_id == int(logits.float().argmax())
    logits[[40, 90, 150]] = 99.0
    assert Sampler(SamplingParams()).sample(logits, PROMPT, ANSWER).token_id == 40


def test_greedy_heeds_penalties():
    logits = torch.zeros(VOCAB)
    logits[7], logits[8] = 2.0, 1.5
    assert Sampler(SamplingParams()).sample(logits, [], [7]).token_id == 7
    assert Sampler(SamplingParams(repetition_penalty=2.0)).sample(logits, [7], []).token_id == 8
    assert Sampler(SamplingParams(frequency_penalty=0.3)).sample(logits, [], [7, 7]).token_id == 8


def test_draws_follow_the_filtered_distribution():
    logits = random_logits(3)
    params = SamplingParams(temperature=1.5, top_k=5, seed=11)
    sampler = Sampler(params)
    drawn = torch.tensor([sampler.sample(logits, [], []).token_id for _ in range(4000)])
    shares = drawn.bincount(minlength=VOCAB) / 4000
    assert torch.allclose(shares, filtered(logits, params).softmax(-1), atol=0.04)  # five standard deviations


def test_the_seed_decides_whatever_others_sample():
    logits = [random_logits(seed) for seed in range(20)]

    def draw(seed, between=lambda: None):
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [(between(), sampler.sample(each, [], []).token_id)[1] for each in logits]

    assert draw(1) == draw(1, between=lambda: torch.rand(3)) != draw(2)


def test_without_a_seed_torch_s_own_decides():
    logits = [random_logits(seed) for seed in range(20)]

    def draw():
        sampler = Sampler(SamplingParams(temperature=2.0))
        return [sampler.sample(each, [], []).token_id for each in logits]

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert draw() == first != second


def test_logprobs_are_the_model_s_own_whatever_is_done_before_the_draw():
    logits = random_logits(5)
    logprobs = logits.log_softmax(-1)
    params = SamplingParams(temperature=0.3, top_k=1, repetition_penalty=5.0, logprobs=4)
    token_id, logprob, top = Sampler(params).sample(logits, PROMPT, ANSWER)
    assert logprob == pytest.approx(float(logprobs[token_id]))
    assert [token for token, _ in top] == logprobs.argsort(descending=True)[:4].tolist()
    assert [value for _, value in top] == pytest.approx(logprobs.sort(descending=True).values[:4].tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_with_a_nan_choose_no_token(temperature):
    logits = random_logits(0)
    logits[7] = math.nan
    with pytest.raises(RuntimeError, match=r"(?i)nan"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [], [])


def test_logprobs_are_reported_only_where_asked_for():
    assert Sampler(SamplingParams()).sample(random_logits(0), [], [])[1:] == (None, [])
    _, logprob, top = Sampler(SamplingParams(logprobs=0)).sample(random_logits(0), [], [])
    assert logprob < 0
    assert top == []
    assert len(Sampler(SamplingParams(logprobs=VOCAB + 1)).sample(random_logits(0), [], []).top) == VOCAB


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 1.5, "whole number"),
        ("max_new_tokens", True, "whole number"),
        ("temperature", -1, "0 \\(greedy\\)"),
        ("temperature", 1e-9, "0 \\(greedy\\)"),
        ("temperature", math.nan, "finite"),
        ("temperature", "hot", "finite"),
        ("temperature", 10**400, "finite"),
        ("top_k", -1, "0 \\(all tokens\\)"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("min_p", -0.1, "0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", math.inf, "finite"),
        ("frequency_penalty", None, "finite"),
        ("seed", -1, "2\\*\\*63"),
        ("seed", 2**63, "2\\*\\*63"),
        ("logprobs", -1, "0 or more"),
        ("stop", "end", "tuple or list"),
        ("stop", ("",), "none of them empty"),
        ("ignore_eos", 1, "True or False"),
        ("logit_bias", 3, "-100 to 100"),
        ("logit_bias", [[1, 2]], "-100 to 100"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, allowed):
    with pytest.raises(ConfigError, match=f"^{field} is .*{allowed}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_number_written_without_a_point_is_the_same_however_large(field):
    tokens = [
        Sampler(SamplingParams(**{"temperature": 1, "seed": 0, field: value})).sample(random_logits(0), PROMPT, ANSWER)
        for value in (10**30, 1e30)
    ]
    assert tokens[0] == tokens[1]


def test_a_list_of_stop_strings_becomes_a_tuple():
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({1: 100.5}, "of token 1 is 100.5; it must be -100 to 100"),
        ({1: math.nan}, "of token 1 is nan"),
        ({1: None}, "of token 1 is None"),
        ({-1: 1}, "has -1, which is no token id"),
        ({2**40: 1}, "no token id"),
        ({True: 1}, "has True, which is no token id"),
        ({"x": 1}, "has 'x', which is no token id"),
        ({"7": 1, 7: 2}, "has token 7 twice"),
        (dict.fromkeys(range(1025), 1), "has 1,025 tokens; at most 1,024"),
    ],
)
def test_a_bias_that_is_none_is_refused_by_name(given, told):
    with pytest.raises(ConfigError, match=f"^logit_bias.*{told}"):
        SamplingParams(logit_bias=given)


def test_biases_are_kept_as_pairs_by_token_and_may_have_the_keys_of_json():
    params = SamplingParams(logit_bias={7: 1, "3": -2})
    assert params.logit_bias == ((3, -2.0), (7, 1.0))
    assert params == SamplingParams(logit_bias=((7, 1.0), (3, -2.0)))
    assert hash(params) == hash(SamplingParams(logit_bias={3: -2, 7: 1}))


def test_a_bias_is_added_to_the_logit_before_penalties_and_not_to_logprobs():
    logits = random_logits(0)
    params = SamplingParams(logit_bias={5: 3.5, 9: -100}, repetition_penalty=2.0, logprobs=0)
    expected = logits.clone()
    expected[5] += 3.5
    expected[9] -= 100
    assert torch.equal(biased(logits, params), expected)
    assert biased(logits, SamplingParams()) is logits
    chosen = Sampler(params).sample(logits, PROMPT, ANSWER)
    assert chosen.token_id == int(penalized(expected, params, PROMPT, ANSWER).argmax())
    assert chosen.logprob == pytest.approx(float(logits.log_softmax(-1)[chosen.token_id]))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}])
def test_filters_choose_among_the_allowed_tokens(options):
    logits, allowed = random_logits(0), torch.zeros(VOCAB, dtype=torch.bool)
    unlikely = logits.argsort()[:3]
    allowed[unlikely] = True
    params = SamplingParams(seed=0, **options)
    assert Sampler(params).sample(logits, [], [], allowed).token_id == int(unlikely[2])
    for size in (VOCAB, 128):
        with pytest.raises(RuntimeError):
            Sampler(params).sample(logits[:size], [], [], torch.zeros(size, dtype=torch.bool))
