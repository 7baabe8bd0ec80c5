"""Families that packed passes cannot run are answered one after the other: the tokens of `generate`, caches kept."""

import dataclasses

import pytest

from helpers.engine_requests import PROMPTS, assert_empty, generated, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.rope_models import rope_model
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import ClosedModelError, ExpertReadError, QueueFullError, UnsupportedModelError

SIX = SamplingParams(max_new_tokens=6, ignore_eos=True)
FAST = ("jamba", "unlimited_ocr", "minimax", "deepseek_v32", "qwen3_next", "lfm2_moe")
OTHERS = (
    "axk2", "bailing_hybrid", "deepseek_v4", "dots3_note", "glm5_next", "glm_moe_dsa", "granitemoehybrid", "hy_v4",
    "inkling", "inkling2", "kimi_linear", "mistral_large4", "nemotron_h", "qwen3_5_moe", "qwen4_exp", "zaya",
)  # fmt: skip


def family_model(name):
    """A tiny model of a family; with two index heads, scores of sparse attention would tie at 0."""
    family, heads = FAMILIES[name], {"index_n_heads": 16}
    if "text_config" in family.model_class.config_class.sub_configs:
        heads = {"text_config": {**family.overrides.get("text_config", {}), **heads}}
    return build_model(dataclasses.replace(family, overrides={**family.overrides, **heads}))


@pytest.fixture(scope="module")
def hybrid():
    return family_model("qwen3_next")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_each_turn_of_a_conversation_has_the_tokens_of_a_fresh_computation(name):
    model, prompt, kept = family_model(name), tokens(12, 3), 0
    with SerialEngine(model) as engine:
        for turn in range(3):
            (done,) = engine.generate([prompt], SIX)
            assert done.token_ids == generated(model, prompt, 6), done.error
            assert done.cached_tokens == kept or (name == "jamba" and not done.cached_tokens), "by measured speeds"
            kept = 0 if name == "unlimited_ocr" else len(prompt) + 5  # it keeps prompts and answers in different ways
            prompt = prompt + done.token_ids + tokens(5, 4 + turn)
        engine.check_integrity()


@pytest.mark.parametrize("name", [pytest.param("diffusion_gemma", marks=pytest.mark.slow), "openai_privacy_filter"])
def test_a_model_that_does_not_generate_token_by_token_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="token by token"):
        SerialEngine(build_model(FAMILIES[name]))


def test_answers_are_those_of_the_engine(mixtral):
    asked = [
        SamplingParams(max_new_tokens=9, temperature=1.5, top_p=0.9, seed=3, logprobs=2),
        SamplingParams(max_new_tokens=9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
        SamplingParams(max_new_tokens=1, prompt_logprobs=1),
        SamplingParams(max_new_tokens=4, prompt_logprobs=2),
    ]
    prompts = PROMPTS[1:5]
    with Engine(mixtral) as engine, SerialEngine(mixtral) as serial:
        for own, other in zip(engine.generate(prompts, asked), serial.generate(prompts, asked), strict=True):
            assert (own.token_ids, own.finish_reason) == (other.token_ids, other.finish_reason)
            assert (own.logprobs is None) == (other.logprobs is None)
            if own.prompt_logprobs is not None:
                values = [[one[0] for one in each.prompt_logprobs[1:]] for each in (own, other)]
                assert values[1] == pytest.approx(values[0], abs=1e-4)
        assert engine.stats().keys() == serial.stats().keys()
        assert serial.stats()["new_tokens"] == engine.stats()["new_tokens"]
        assert_empty(serial)


def test_text_and_stop_strings_are_those_of_the_engine(speaking, tokenizer):
    (whole,) = Engine(speaking, tokenizer).generate(["hello"], SamplingParams(max_new_tokens=20, ignore_eos=True))
    stop = SamplingParams(max_new_tokens=20, ignore_eos=True, stop=(whole.text[4:7],))
    (own,), serial = Engine(speaking, tokenizer).generate(["hello"], stop), SerialEngine(speaking, tokenizer)
    (other,) = serial.generate(["hello"], stop)
    assert (other.text, other.token_ids, other.finish_reason) == (own.text, own.token_ids, "stop")
    assert "".join(serial.stream("hello", stop)) == own.text


def test_a_bound_answer_is_the_engines(speaking, tokenizer):
    bound = SamplingParams(max_new_tokens=20, regex="(yes|no), always [0-9]{3}", ignore_eos=True)
    (own,), serial = Engine(speaking, tokenizer).generate(["hello"], bound), SerialEngine(speaking, tokenizer)
    (other,) = serial.generate(["hello"], bound)
    assert (other.text, other.token_ids, other.finish_reason) == (own.text, own.token_ids, "stop")


def test_nothing_is_written_to_files_and_a_warning_says_so(hybrid, tmp_path, caplog):
    with SerialEngine(hybrid) as engine:
        engine.generate([tokens(20, 1)], SIX)
        assert (engine.save_kept(tmp_path), engine.load_kept(tmp_path)) == (0, 0)
    assert not list(tmp_path.iterdir())
    assert "Qwen3NextForCausalLM: conversations are kept in memory alone" in caplog.text


def test_a_family_that_keeps_each_position_alone_goes_back_to_where_prompts_part():
    model, prompt = family_model("deepseek_v32"), tokens(14, 8)
    with SerialEngine(model) as engine:
        engine.generate([prompt], SIX)
        (again,) = engine.generate([prompt], SIX)
        (other,) = engine.generate([prompt[:10] + tokens(5, 9)], SIX)
        assert (again.cached_tokens, again.token_ids) == (13, generated(model, prompt, 6))
        assert (other.cached_tokens, other.token_ids) == (10, generated(model, other.prompt_ids, 6))


def test_a_family_with_one_state_for_all_positions_keeps_it_where_prompts_have_parted(hybrid):
    prompt, cached = tokens(20, 8), []
    with SerialEngine(hybrid) as engine:
        for own in (prompt, prompt + tokens(4, 1), prompt + tokens(4, 2), prompt + tokens(4, 3)):
            (done,) = engine.generate([own], SIX)
            assert done.token_ids == generated(hybrid, own, 6)
            cached.append(done.cached_tokens)
        engine.check_integrity()
    assert cached == [0, 0, 20, 20], "the second parts from the first, the others from both"


def test_a_conversation_whose_answers_change_when_they_are_past_is_kept_up_to_the_one_before(hybrid):
    prompt, cached = tokens(18, 8), []
    with SerialEngine(hybrid) as engine:
        for turn in range(3):
            (done,) = engine.generate([prompt], SIX)
            assert done.token_ids == generated(hybrid, prompt, 6)
            cached.append((done.cached_tokens, len(prompt)))
            prompt = prompt + done.token_ids[3:] + tokens(4, turn)  # without its reasoning
    assert cached == [(0, 18), (0, 25), (18, 32)]


def test_an_interrupt_in_a_step_leaves_no_half_computed_cache(hybrid):
    engine, prompt = SerialEngine(hybrid), tokens(12, 3)
    engine.add(prompt, SIX)
    engine.step()

    def interrupt(*args):
        hook.remove()
        raise KeyboardInterrupt

    hook = hybrid.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    done = []
    while not engine.finished:
        done += [output.completion for output in engine.step() if output.completion]
    assert done[0].token_ids == generated(hybrid, prompt, 6)


def test_a_prompt_of_which_only_log_probabilities_are_wanted_takes_one_pass(hybrid):
    calls = []
    with SerialEngine(hybrid) as engine:
        hook = hybrid.lm_head.register_forward_hook(lambda *args: calls.append(args))
        engine.generate([tokens(5, 1)], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
        hook.remove()
    assert len(calls) == 1


def test_nothing_is_kept_where_positions_are_scaled_by_the_length():
    model, prompt = rope_model("dynamic"), tokens(20, 3)
    with SerialEngine(model) as engine:
        (first,) = engine.generate([prompt], SIX)
        (second,) = engine.generate([prompt + first.token_ids + tokens(5, 4)], SIX)
        assert (second.cached_tokens, len(second.token_ids)) == (0, 6)


def test_a_cancelled_request_keeps_what_it_had_and_leaves_it_to_the_next(hybrid):
    engine, prompt = SerialEngine(hybrid), tokens(12, 3)
    whole = generated(hybrid, prompt, 6)
    first, second = engine.add(prompt, SIX), engine.add(tokens(3, 5), SIX)
    for _ in range(3):
        engine.step()
    assert engine.stats()["kv_used_bytes"] > 0
    assert engine.cancel(first)
    assert engine.cancel(second)
    done = {one.id: one.completion for one in engine.step()}
    assert (done[first].token_ids, done[first].finish_reason) == (whole[:3], "cancelled")
    assert done[second].token_ids == []
    assert_empty(engine)
    (again,) = engine.generate([prompt + whole[:3]], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert (again.token_ids, again.cached_tokens) == (whole[3:], 14)


def test_the_higher_priority_goes_first_and_a_full_queue_refuses(hybrid):
    one = SamplingParams(max_new_tokens=1)
    engine = SerialEngine(hybrid, max_waiting=2)
    names = [engine.add(tokens(3, 1), one, priority=priority) for priority in (0, 0, 5)]
    with pytest.raises(QueueFullError):
        engine.add(tokens(3, 1), one)
    ended = []
    while not engine.finished:
        ended += [output.id for output in engine.step()]
    assert ended == [names[2], names[0], names[1]]


def test_prompts_that_cannot_be_run_fail_alone(hybrid):
    with SerialEngine(hybrid) as engine:
        wrong, right, long = engine.generate([[], tokens(3, 1), tokens(70, 1)], SIX)
        assert (wrong.finish_reason, long.finish_reason) == ("error", "error")
        assert "context" in long.error
        assert right.token_ids == generated(hybrid, tokens(3, 1), 6)


def test_a_closed_engine_has_released_everything_and_the_model_goes_on(hybrid):
    engine, prompt = SerialEngine(hybrid), tokens(5, 2)
    engine.generate([prompt], SIX)
    assert engine.stats()["kv_kept_bytes"] > 0
    engine.add(prompt, SIX)
    engine.step()
    engine.close()
    assert (engine.stats()["kv_used_bytes"], engine.stats()["kv_kept_bytes"]) == (0, 0)
    with pytest.raises(ClosedModelError):
        engine.add(prompt, SIX)
    assert len(generated(hybrid, prompt, 6)) == 6


def test_a_read_error_fails_its_request_alone_and_leaves_no_half_computed_cache(tmp_path, hybrid, monkeypatch):
    hybrid.save_pretrained(tmp_path)
    model, prompt = load_moe(tmp_path, expert_memory="50%", predictor=None, step="python"), tokens(12, 3)
    with model.moeflow as runtime, SerialEngine(model) as engine:
        read, countdown = runtime.store.read, []

        def failing(key, record, **how):
            if countdown and not countdown.pop():
                raise ExpertReadError("the disk failed")
            return read(key, record, **how)

        monkeypatch.setattr(runtime.store, "read", failing)
        (whole,) = engine.generate([prompt], SIX)
        (whole,) = engine.generate([prompt + whole.token_ids + tokens(5, 4)], SIX)  # tries several tokens at once
        turn = whole.prompt_ids + whole.token_ids + tokens(5, 5)
        countdown += [False, True]
        (failed,) = engine.generate([turn], SIX)
        assert failed.error == "ExpertReadError: the disk failed"
        assert_empty(engine)
        (done,) = engine.generate([turn], SIX)
        assert (done.token_ids, done.cached_tokens) == (generated(hybrid, turn, 6), 0)
