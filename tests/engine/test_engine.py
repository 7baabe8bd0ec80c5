"""The engine as its users call it: the tokens of generate() whatever runs beside them, and nothing left behind."""

import functools
import random
import threading
import weakref

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from helpers.families import FAMILIES, build_model
from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer
from moeflow import load_moe
from moeflow.core import ExpertKey
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ClosedModelError, ConfigError, ExpertReadError, MoeflowError, UnsupportedModelError
from moeflow.hf.forward import KeyValueCache
from moeflow.loading.budget import ExpertsSize

NEW = 8
POSITION_BYTES = 3 * 2 * 2 * 16 * 4  # of the tiny Mixtral: layers, keys and values, heads, features, float32
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


def tokens(count, seed=0, below=120):
    return torch.randint(3, below, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = tokens(18)
PROMPTS = [
    tokens(1, 1),
    PREFIX + tokens(3, 2),
    tokens(11, 3),
    PREFIX + tokens(1, 4),
    tokens(5, 5),
    PREFIX + tokens(7, 6),
]
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


def generated(model, prompt, num_new=NEW):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(ids, **options)[0, len(prompt) :].tolist()


def answers(engine, prompts=PROMPTS, params=GREEDY):
    completions = engine.generate(prompts, params)
    assert [completion.error for completion in completions] == [None] * len(prompts)
    return [completion.token_ids for completion in completions]


def assert_empty(engine):
    engine.check_integrity()
    stats = engine.stats()
    assert (stats["kv_used_bytes"], stats["waiting"], stats["running"]) == (0, 0, 0)
    assert engine.finished


@pytest.fixture(scope="module")
def expected(mixtral):
    return [generated(mixtral, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def speaking(tokenizer):
    """A model whose tokens have text."""
    return tiny_mixtral(vocab_size=len(tokenizer))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_tokens_depend_neither_on_pieces_nor_on_sharing_nor_on_who_runs_beside(name):
    model = build_model(FAMILIES[name])
    found = []
    for batch, budget, share in ((1, 1, False), (2, 5, False), (4, 512, True), (6, 512, False)):
        with Engine(model, max_batch_size=batch, max_step_tokens=budget, share_prefixes=share) as engine:
            found.append(answers(engine))
            assert (engine.stats()["shared_tokens"] > 0) == share
    assert found == [found[0]] * 4


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_model_the_engine_cannot_run_is_refused_by_its_reason(name, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(build_model(FAMILIES[name]))


def test_attention_that_cannot_be_cut_is_refused(mixtral, monkeypatch):
    before = mixtral.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(modeling_mixtral, "create_causal_mask", lambda **kwargs: None)
        with pytest.raises(UnsupportedModelError, match="MixtralAttention makes its attention masks itself"):
            Engine(mixtral)
    bias = functools.partialmethod(modeling_mixtral.MixtralAttention.forward, position_bias=torch.zeros(1, 4, 1, 1))
    monkeypatch.setattr(modeling_mixtral.MixtralAttention, "forward", bias)
    with pytest.raises(UnsupportedModelError, match="MixtralAttention gives its attention position_bias"):
        Engine(mixtral)
    assert mixtral.config._attn_implementation == before


def test_attention_past_the_interface_is_refused(mixtral, monkeypatch):
    def forward(self, hidden_states, **kwargs):
        cache = next(value for value in kwargs.values() if isinstance(value, KeyValueCache))
        cache.update(hidden_states[:, None], hidden_states[:, None], self.layer_idx)
        return hidden_states, None

    monkeypatch.setattr(modeling_mixtral.MixtralAttention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"does not call transformers' .* \(0 calls, 3 layers\)"):
        Engine(mixtral)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_give_the_tokens_of_generate(mixtral, expected, implementation, window):
    model = tiny_mixtral(attn_implementation=implementation, sliding_window=window)
    model.load_state_dict(mixtral.state_dict())
    with Engine(model, max_step_tokens=32, max_batch_size=3) as engine:
        assert answers(engine) == [generated(model, prompt) for prompt in PROMPTS]
        assert engine.stats()["shared_tokens"] > 0
    assert (answers(Engine(model)) == expected) == (window is None), "the window cuts nothing here"


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


def test_a_shared_beginning_is_computed_once(mixtral):
    prompts = [[*PREFIX, 3 + place, 7] for place in range(5)]
    with Engine(mixtral) as engine:
        assert answers(engine, prompts) == [generated(mixtral, prompt) for prompt in prompts]
        stats = engine.stats()
    assert stats["shared_tokens"] == 4 * len(PREFIX)
    assert stats["prompt_tokens"] == len(PREFIX) + 5 * 2


def test_equal_prompts_compute_their_last_token_each(mixtral):
    with Engine(mixtral) as engine:
        first, *others = answers(engine, [PREFIX] * 3)
        assert others == [first] * 2
        assert first == generated(mixtral, PREFIX)
        assert engine.stats()["prompt_tokens"] == len(PREFIX) + 2


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


def test_a_cancelled_request_frees_its_slot_and_keeps_what_it_had(mixtral, expected):
    engine = Engine(mixtral, max_batch_size=2)
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    used = engine.stats()["kv_used_bytes"]
    assert engine.cancel(ids[0])
    assert engine.cancel(ids[-1])  # still waiting
    assert not engine.cancel(ids[0])
    assert not engine.cancel("nobody")
    assert engine.stats()["kv_used_bytes"] < used
    engine.check_integrity()
    done = {}
    while not engine.finished:
        done |= {one.id: one.completion for one in engine.step() if one.completion}
    assert (done[ids[0]].finish_reason, done[ids[0]].token_ids) == ("cancelled", expected[0][:3])
    assert (done[ids[-1]].finish_reason, done[ids[-1]].token_ids) == ("cancelled", [])
    assert [done[id].token_ids for id in ids[1:-1]] == expected[1:-1]
    assert_empty(engine)


def test_an_id_that_is_under_way_is_refused(mixtral):
    engine = Engine(mixtral)
    engine.add(PROMPTS[0], GREEDY, id="mine")
    with pytest.raises(ConfigError, match="'mine' is under way"):
        engine.add(PROMPTS[1], GREEDY, id="mine")
    while not engine.finished:
        engine.step()
    assert engine.add(PROMPTS[1], GREEDY, id="mine") == "mine"


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


def test_a_stream_ends_though_somebody_else_was_told_its_end(speaking, tokenizer):
    engine = Engine(speaking, tokenizer)
    stream = engine.stream("The quick", GREEDY)
    next(stream)
    while not engine.finished:
        engine.step()
    assert list(stream) == []
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


def test_a_sequence_for_which_the_machine_has_no_memory_fails_alone(expected, mixtral):
    model = tiny_mixtral(max_position_embeddings=10**15)
    model.load_state_dict(mixtral.state_dict())
    with Engine(model, kv_memory=10**18) as engine:
        each = [GREEDY, SamplingParams(max_new_tokens=10**13), GREEDY]
        first, large, last = engine.generate(PROMPTS[:3], each)
        assert (first.token_ids, last.token_ids) == (expected[0], expected[2])
        assert large.finish_reason == "error"
        assert "no memory for keys and values" in large.error
        assert_empty(engine)


def test_a_sequence_gets_the_memory_of_one_that_is_kept_to_be_shared(mixtral, monkeypatch):
    prompts = [[*PREFIX, 5], [*PREFIX, 6]]
    with Engine(mixtral, max_batch_size=1) as engine:
        allocate = engine._slots.allocate

        def machine_without_room_for_two(id, num_positions):
            if len(engine._slots):
                raise RuntimeError("there is no memory")
            return allocate(id, num_positions)

        monkeypatch.setattr(engine._slots, "allocate", machine_without_room_for_two)
        assert answers(engine, prompts) == [generated(mixtral, prompt) for prompt in prompts]
        assert_empty(engine)


def test_an_id_is_free_again_while_its_beginning_is_kept_to_be_shared(mixtral):
    with Engine(mixtral, max_batch_size=2) as engine:
        done = {}

        def step():
            done.update((one.id, one.completion.token_ids) for one in engine.step() if one.completion)
            engine.check_integrity()

        for id, prompt in (("a", [*PREFIX, 5]), ("c", tokens(len(PREFIX) + 1, 9)), ("b", [*PREFIX, 6])):
            engine.add(prompt, GREEDY, id=id)
        while not done:
            step()
        del done["c"]  # it ended with the first, so that two come in at once
        assert [one.id for one in engine._kept.donors()] == ["a"]
        engine.add([*PREFIX, 7], GREEDY, id="a")
        while not engine.finished:
            step()
        assert done == {"a": generated(mixtral, [*PREFIX, 7]), "b": generated(mixtral, [*PREFIX, 6])}


@pytest.mark.parametrize("share", [True, False])
def test_a_beginning_is_kept_as_long_as_somebody_is_to_share_it(mixtral, share):
    one = (len(PREFIX) + NEW) * POSITION_BYTES
    for cancelled in (True, False):
        engine, done = Engine(mixtral, max_batch_size=1, share_prefixes=share), []
        for id, last in (("a", 5), ("b", 6)):
            engine.add([*PREFIX, last], GREEDY, id=id)
        while not done:
            done = [progress for progress in engine.step() if progress.completion]
        assert engine.stats()["kv_used_bytes"] == one * share
        if cancelled:
            engine.cancel("b")
            assert engine.stats()["kv_used_bytes"] == 0
        else:
            engine.step()
            assert engine.stats()["kv_used_bytes"] == one
            assert engine.stats()["shared_tokens"] == len(PREFIX) * share
        engine.close()


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


@pytest.mark.parametrize("predictor", [None, "auto"])
def test_offloaded_experts_give_the_same_tokens_and_are_fetched_once_a_step(mixtral_folder, expected, predictor):
    with load_moe(mixtral_folder, expert_memory="100%", predictor=None).moeflow as whole:
        least = ExpertsSize.of([source.layout for source in whole.store.layers], 2).min_bytes
    model = load_moe(mixtral_folder, expert_memory=least, predictor=predictor)
    with model.moeflow as runtime:
        engine = Engine(model, max_batch_size=6, max_step_tokens=64)
        runtime.reset_stats()
        assert answers(engine) == expected
        assert_empty(engine)
        runtime.check_integrity()
        stats, steps = runtime.stats(), engine.stats()["steps"]
        assert stats["decode"]["forwards"] + stats["prefill"]["forwards"] == steps
        assert stats["decode"]["tokens"] + stats["prefill"]["tokens"] == sum(
            engine.stats()[name] for name in ("prompt_tokens", "new_tokens")
        ) - len(PROMPTS)
        demands = sum(stats[phase][name] for phase in ("decode", "prefill") for name in ("hits", "misses"))
        assert demands <= steps * 3 * 8
        assert answers(engine, PROMPTS[:1]) == expected[:1]  # generate() and the engine take turns
        assert generated(model, PROMPTS[1]) == expected[1]


@pytest.mark.parametrize("groups", [{}, {"group_size": 2}], ids=["one pass", "groups"])
def test_in_a_pass_resident_experts_run_first_while_each_other_one_is_fetched_once(
    mixtral_folder, expected, monkeypatch, groups
):
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=None)  # more slots than a layer has experts
    with model.moeflow as runtime, Engine(model, max_batch_size=6, **groups) as engine:
        cache, fetch, read, fetched, layers = runtime.cache, runtime.fetch, runtime.store.read, [], []

        def reading(key, record):
            fetched.append(key)
            return read(key, record)

        def watched(layer, experts, *rest):
            keys, order, under_way = [ExpertKey(layer, expert) for expert in experts], [], []
            resident = {key.expert for key in keys if key in cache}
            fetched.clear()
            for batch in fetch(layer, experts, *rest):
                order += [one.expert for one in batch]
                under_way.append(sum(key in cache.slots and key not in cache for key in keys))
                yield batch
            missing = set(experts) - resident
            assert set(order[: len(resident)]) == resident
            assert sorted(order) == sorted(experts)
            assert sorted(fetched) == [ExpertKey(layer, expert) for expert in sorted(missing)]
            assert not (resident and missing) or under_way[0], "no miss was on its way beside compute"
            layers.append(bool(resident and missing))

        monkeypatch.setattr(runtime.store, "read", reading)
        monkeypatch.setattr(runtime, "fetch", watched)
        runtime.reset_stats()
        assert answers(engine) == expected
        assert len(layers) == 3 * engine.stats()["passes"]
        stats = runtime.stats()
        hidden = sum(stats[phase]["decisions"]["went_on_with_resident"] for phase in ("prefill", "decode"))
        assert hidden == sum(layers) > 10


def test_passes_are_told_by_sequence_only_while_these_stay_the_same(mixtral_folder, monkeypatch):
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        engine, told, begin_forward = Engine(model, max_batch_size=2), [], runtime.begin_forward

        def heard(*shape, continues, token_ids):
            told.append((*shape, continues, None if token_ids is None else list(token_ids.shape)))
            begin_forward(*shape, continues=continues, token_ids=token_ids)

        monkeypatch.setattr(runtime, "begin_forward", heard)
        engine.add([*PREFIX, 5], SamplingParams(max_new_tokens=6, ignore_eos=True))
        engine.add([9], SamplingParams(max_new_tokens=3, ignore_eos=True))
        engine.add([*PREFIX, 6], SamplingParams(max_new_tokens=4, ignore_eos=True))
        while not engine.finished:
            engine.step()
        for prompts in ([[9, 8]], [[9], [8]]):
            answers(engine, prompts, SamplingParams(max_new_tokens=1))
    assert told == [
        (1, 20, False, None),
        (2, 1, True, [2, 1]),
        (2, 1, True, [2, 1]),
        (2, 1, True, None),  # the third took the place of the second
        (2, 1, True, [2, 1]),
        (2, 1, True, [2, 1]),
        (1, 1, True, None),
        (1, 2, False, None),
        (1, 2, False, None),
    ]


@pytest.mark.parametrize("predictor", ["markov", "lookahead"])
def test_a_predictor_beside_the_engine_neither_fails_nor_changes_a_token(mixtral_folder, expected, predictor):
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=predictor)
    with model.moeflow as runtime:
        assert answers(Engine(model, max_batch_size=3)) == expected
        prediction = runtime.stats()["prediction"]
        assert prediction["failure"] is None
        assert prediction["steps_on"] + prediction["steps_off"] > 0
        runtime.check_integrity()


def test_a_trace_is_not_recorded_from_mixed_passes(mixtral_folder, tmp_path):
    model = load_moe(mixtral_folder, trace=tmp_path / "t.trace")
    with model.moeflow, pytest.raises(ConfigError, match="without trace="):
        Engine(model)


def test_an_expert_that_cannot_be_read_fails_only_who_needs_it(mixtral_folder, expected, monkeypatch):
    model = load_moe(mixtral_folder, expert_memory="25%", predictor=None)
    with model.moeflow as runtime:
        store, read = runtime.store, runtime.store.read
        engine = Engine(model, max_batch_size=6)
        broken = set()

        def failing(key, record):
            if key in broken:
                raise ExpertReadError(f"expert {key.expert} of layer {key.layer}: the disk failed")
            return read(key, record)

        monkeypatch.setattr(store, "read", failing)
        failed = set()
        for layer in range(3):
            for expert in range(0, 8, 3):
                broken = {ExpertKey(layer, expert)}
                completions = engine.generate(PROMPTS, GREEDY)
                for place, completion in enumerate(completions):
                    if completion.finish_reason == "error":
                        assert "the disk failed" in completion.error
                        assert completion.token_ids == expected[place][: len(completion.token_ids)]
                        failed.add(place)
                    else:
                        assert completion.token_ids == expected[place]
                assert_empty(engine)
        assert failed, "no request met a broken expert"
        assert engine.stats()["finished"]["length"], "no request got past one"
        broken = set()
        assert answers(engine) == expected


def test_an_engine_starts_though_experts_of_the_first_tokens_cannot_be_read(mixtral_folder, expected, monkeypatch):
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime, torch.no_grad():
        model(torch.tensor([[0]]))
        broken = {key for key in runtime.cache.resident() if key.layer == 1}
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        read = runtime.store.read

        def failing(key, record):
            if key in broken:
                raise ExpertReadError("the disk failed")
            return read(key, record)

        monkeypatch.setattr(runtime.store, "read", failing)
        with torch.no_grad(), pytest.raises(ExpertReadError):
            model(torch.tensor([[0]]))
        engine, broken = Engine(model), set()
        assert answers(engine) == expected
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        broken = {ExpertKey(2, expert) for expert in range(8)}
        read = runtime.store.read
        monkeypatch.setattr(runtime.store, "read", failing)
        with pytest.raises(ExpertReadError, match="the disk failed"):
            Engine(model)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [{}, {"group_size": 4}], ids=["one pass", "groups"])
def test_five_hundred_requests_with_cancels_at_random_leave_nothing_behind(mixtral, mixtral_folder, groups):
    torch.set_num_threads(1)
    rng = random.Random(0)
    pool = [tokens(rng.randrange(1, 30), seed) for seed in range(6)]
    pool += [pool[place] + pool[(place + 1) % 6] for place in range(6)]
    whole = answers(Engine(mixtral), pool, SamplingParams(max_new_tokens=5, ignore_eos=True))
    threads = set(threading.enumerate())
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=None) if groups else mixtral
    engine = Engine(model, max_batch_size=16, max_step_tokens=64, kv_memory=300 * POSITION_BYTES, **groups)
    wanted, cancelled, slots = {}, set(), weakref.WeakSet()
    while len(wanted) < 500 or not engine.finished:
        for _ in range(min(rng.randrange(12), 500 - len(wanted))):
            place, num_new = rng.randrange(6) + 6 * (rng.random() < 0.3), rng.randrange(1, 6)
            id = engine.add(pool[place], SamplingParams(max_new_tokens=num_new, ignore_eos=True), id=str(len(wanted)))
            wanted[id] = whole[place][:num_new]
        if rng.random() < 0.5 and wanted:
            id = str(rng.randrange(len(wanted)))
            cancelled |= {id} if engine.cancel(id) else set()
        reported = engine.step()
        slots.update(engine._slots[sequence.id] for sequence in engine._scheduler.running)
        for _, _, _, completion in reported:
            if completion is not None:
                expected = wanted[completion.id]
                assert (completion.finish_reason == "cancelled") == (completion.id in cancelled)
                assert completion.token_ids == expected[: len(completion.token_ids)]
                assert completion.id in cancelled or completion.token_ids == expected
        engine.check_integrity()
        if groups:
            assert len(engine._groups._scheduler._likely) <= engine.stats()["running"]
            model.moeflow.check_integrity()
    reasons = engine.stats()["finished"]
    assert reasons == {"stop": 0, "length": 500 - len(cancelled), "cancelled": len(cancelled), "error": 0}
    assert len(cancelled) > 10
    assert_empty(engine)
    assert not slots, "somebody holds keys and values of what has ended"
    if groups:
        assert engine.stats()["regrouping"]["planned"] > 10
        assert len(engine._groups._scheduler._likely) == 0
        model.moeflow.close()
    engine.close()
    assert set(threading.enumerate()) == threads


def test_a_closed_engine_has_released_everything_and_the_model_goes_on(mixtral, expected):
    engine = Engine(mixtral)
    engine.add(PROMPTS[0], GREEDY)
    engine.step()
    engine.close()
    assert engine.finished
    assert engine.stats()["kv_used_bytes"] == 0
    with pytest.raises(ClosedModelError):
        engine.step()
    with pytest.raises(ClosedModelError):
        engine.add(PROMPTS[0], GREEDY)
    assert generated(mixtral, PROMPTS[0]) == expected[0]


def test_a_model_that_was_closed_says_so(mixtral_folder):
    model = load_moe(mixtral_folder)
    engine = Engine(model)
    model.moeflow.close()
    engine.add(PROMPTS[0], GREEDY)
    with pytest.raises(ClosedModelError):
        engine.step()
