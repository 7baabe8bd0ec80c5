"""Answers with drafts are the tokens of answers without, whatever proposes the drafts."""

import logging
import math
import re

import pytest
import torch

from helpers.engine_requests import PROMPTS, assert_empty, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.sharded_models import reshard
from helpers.small_models import tiny_mixtral
from helpers.told_drafts import Told, always, likely_or_not, use
from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.engine.speculation.drafts import Draft
from moeflow.errors import ConfigError
from moeflow.kernels.cpu.library import instruction_set

ALWAYS = {"gated": False, "packed": True}
NATIVE = {"gated": False}
needs_kernels = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")


def answer_all(model, params, *, speculation, source=None, prompts=PROMPTS, tokenizer=None, **options):
    """Completions of an engine, and its statistics."""
    with Engine(model, tokenizer, speculation=speculation, **options) as engine:
        if source is not None:
            use(engine, source)
        completions = engine.generate(prompts, params)
        assert_empty(engine)
        return completions, engine.stats()


def facts(completions):
    return [(one.token_ids, one.text, one.finish_reason, one.error, one.stop) for one in completions]


def logprobs_of(completions):
    return torch.tensor([one[0] for completion in completions for one in completion.logprobs])


def compare(model, params, *, tokenizer=None, prompts=PROMPTS, **options):
    """Check that drafts of all kinds change nothing; return the completions, and counts of the told drafts."""
    expected, _ = answer_all(model, params, speculation=None, tokenizer=tokenizer, prompts=prompts, **options)
    told = likely_or_not({tuple(one.prompt_ids): one.token_ids for one in expected})
    found, _ = answer_all(model, params, speculation=ALWAYS, tokenizer=tokenizer, prompts=prompts, **options)
    assert facts(found) == facts(expected)
    found, stats = answer_all(
        model, params, speculation=ALWAYS, source=told, tokenizer=tokenizer, prompts=prompts, **options
    )
    assert facts(found) == facts(expected)
    if params.logprobs is not None:
        assert torch.allclose(logprobs_of(found), logprobs_of(expected), atol=1e-4)
    return expected, stats["speculation"]["sources"]["told"]


@pytest.fixture(scope="module")
def mixtral():
    return tiny_mixtral().eval()


def params(**options):
    return SamplingParams(**{"max_new_tokens": 40, "ignore_eos": True, **options})


@pytest.mark.parametrize(
    "asked",
    [
        params(),
        params(temperature=0.9, seed=7),
        params(temperature=1.3, top_p=0.9, top_k=20, seed=3),
        params(repetition_penalty=1.3, frequency_penalty=0.5),
        params(logprobs=3, prompt_logprobs=2),
        params(max_new_tokens=3),
        params(ignore_eos=False, temperature=1.5, seed=11),
    ],
    ids=["greedy", "seed", "filters", "penalties", "logprobs", "short", "eos"],
)
def test_tokens_with_drafts_are_those_without(mixtral, asked):
    _, counts = compare(mixtral, asked, max_batch_size=3)
    assert counts["accepted"] > 0
    assert counts["proposed"] > counts["accepted"]


def test_an_end_inside_a_draft_ends_the_answer_there(mixtral):
    (whole,), _ = answer_all(mixtral, params(), speculation=None, prompts=PROMPTS[:1])
    end = whole.token_ids[20]
    mixtral.generation_config.eos_token_id = end
    try:
        (found,), counts = compare(mixtral, params(ignore_eos=False), prompts=PROMPTS[:1])
    finally:
        mixtral.generation_config.eos_token_id = None
    assert found.finish_reason == "stop"
    assert found.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert counts["accepted"] > 0


def test_stop_strings_and_grammars_end_inside_drafts(speaking, tokenizer):
    prompts = ["once upon", "a list:"]
    (one, *_), _ = compare(speaking, params(), tokenizer=tokenizer, prompts=prompts)
    place = next(i for i in range(4, len(one.text)) if one.text[i : i + 2].isprintable())
    stopped, counts = compare(
        speaking, params(stop=(one.text[place : place + 2],)), tokenizer=tokenizer, prompts=prompts
    )
    assert stopped[0].finish_reason == "stop"
    assert counts["accepted"] > 0
    for jump_forward in (True, False):
        asked = params(regex=r"(abc|xyz)+ and then [0-9]{9}", max_new_tokens=60)
        _, counts = compare(speaking, asked, tokenizer=tokenizer, prompts=prompts, jump_forward=jump_forward)
        assert counts["accepted"] > 0


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss", "qwen3_moe", "olmoe"])
def test_families_answer_with_drafts_as_without(name):
    model = build_model(FAMILIES[name]).eval()
    _, counts = compare(model, params(max_new_tokens=24), prompts=PROMPTS[:3])
    assert counts["accepted"] > 0


@pytest.mark.parametrize(
    "propose",
    [
        lambda sequence, most: 1 / 0,
        lambda sequence, most: Draft((5,), (math.nan,)),
        lambda sequence, most: Draft((10**6,), (0.5,)),
        lambda sequence, most: Draft((5.0,), (0.5,)),
        lambda sequence, most: Draft((5, 6), (0.5,)),
        lambda sequence, most: None,
    ],
    ids=["raises", "nan", "no token", "a float", "lengths", "nothing"],
)
def test_a_source_that_fails_is_off_with_one_warning_and_answers_stay(mixtral, propose, caplog):
    expected, _ = answer_all(mixtral, params(), speculation=None)
    with caplog.at_level(logging.WARNING):
        found, stats = answer_all(mixtral, params(), speculation=ALWAYS, source=Told(propose))
    assert facts(found) == facts(expected)
    assert len(caplog.records) == 1
    assert stats["speculation"]["sources"]["told"]["reason"]
    assert not stats["speculation"]["on"]


def test_a_draft_longer_than_what_is_left_is_cut(mixtral):
    source = Told(lambda sequence, most: Draft((7,) * 500, (0.5,) * 500))
    expected, _ = answer_all(mixtral, params(), speculation=None)
    found, stats = answer_all(mixtral, params(), speculation=ALWAYS | {"most": 31}, source=source)
    assert facts(found) == facts(expected)
    assert stats["speculation"]["sources"]["told"]["proposed"] > 0


def test_a_draft_longer_than_the_context_that_is_left_is_cut(mixtral):
    """An answer that ends with the model's last position."""
    prompts = [tokens(246, 1), tokens(250, 2)]
    lengths = [mixtral.config.max_position_embeddings - len(prompt) for prompt in prompts]
    source = Told(lambda sequence, most: Draft((7,) * 500, (0.5,) * 500))
    for prompt, length in zip(prompts, lengths, strict=True):
        asked = params(max_new_tokens=length)
        expected, _ = answer_all(mixtral, asked, speculation=None, prompts=[prompt])
        found, stats = answer_all(mixtral, asked, speculation=ALWAYS | {"most": 31}, source=source, prompts=[prompt])
        assert facts(found) == facts(expected)
        assert len(found[0].token_ids) == length
        assert stats["speculation"]["sources"]["told"]["proposed"] > 0


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_draft_model_that_fails_is_off_with_one_warning_and_answers_stay(mixtral, broken, caplog):
    draft = tiny_mixtral(num_hidden_layers=1)
    with torch.no_grad():
        if broken == "nan":
            draft.lm_head.weight[5] = torch.nan
        else:  # of another width than what comes in
            draft.lm_head.weight = torch.nn.Parameter(torch.zeros(128, 8))
    expected, _ = answer_all(mixtral, params(), speculation=None)
    option = ALWAYS | {"draft_model": draft, "sources": ()}
    with caplog.at_level(logging.WARNING):
        found, stats = answer_all(mixtral, params(), speculation=option)
    assert facts(found) == facts(expected)
    assert len(caplog.records) == 1
    assert stats["speculation"]["sources"]["draft_model"]["reason"]
    assert not stats["speculation"]["on"]


def test_prompts_that_come_meanwhile_are_not_held_up(mixtral):
    def steps_until_done(speculation):
        with Engine(mixtral, max_step_tokens=8, max_batch_size=2, speculation=speculation) as engine:
            engine.add(tokens(4, 1), params(max_new_tokens=100), id="first")
            for _ in range(6):
                engine.step()
            engine.add(tokens(60, 2), params(max_new_tokens=1), id="second")
            for number in range(100):
                if any(one.id == "second" and one.completion for one in engine.step()):
                    return number

    assert steps_until_done(ALWAYS) == steps_until_done(None)


def test_where_there_are_none_statistics_say_why(mixtral):
    def reason(engine):
        with engine:
            found = engine.stats()["speculation"]
            assert not found["on"]
            return found["reason"]

    assert reason(Engine(mixtral, speculation=None)) == "not asked for"
    assert reason(Engine(mixtral)) == "not asked for"
    assert "natively" in reason(Engine(mixtral, speculation={"most": 7}))
    assert "one sequence at a time" in reason(SerialEngine(mixtral))


@pytest.mark.parametrize(
    "option",
    [
        "on",
        3,
        {"most": 0},
        {"most": 32},
        {"sources": ("magic",)},
        {"sources": ()},
        {"depth": 3},
        {"sources": "prompt_lookup"},
        {"draft_tokenizer": "one"},
    ],
    ids=str,
)
def test_options_that_are_not_allowed_are_refused(mixtral, option):
    with pytest.raises(ConfigError, match="speculation"):
        Engine(mixtral, speculation=option)


@needs_kernels
def test_native_steps_verify_drafts(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "model")
    options = {"predictor": None, "step": "auto", "device": "cpu"}
    model = load_moe(tmp_path / "model", expert_memory="100%", **options)
    with model.moeflow:
        expected, _ = answer_all(model, params(temperature=0.8, seed=4), speculation=None, prompts=PROMPTS[:2])
        told = {tuple(one.prompt_ids): one.token_ids for one in expected}
        found, stats = answer_all(
            model, params(temperature=0.8, seed=4), speculation=NATIVE, source=likely_or_not(told), prompts=PROMPTS[:2]
        )
        assert facts(found) == facts(expected)
        assert stats["speculation"]["sources"]["told"]["accepted"] > 0


def expert_of(name):
    """A number for each expert, 0 for all else."""
    found = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.", name)
    return 0 if found is None else 1 + 64 * int(found[1]) + int(found[2])


@pytest.mark.slow
@needs_kernels
def test_an_expert_that_only_a_draft_needs_and_that_cannot_be_read_fails_nothing(tmp_path):
    """Each expert has a file of its own; one that was changed behind the model's back is refused when it is read."""
    tiny_mixtral(num_local_experts=64).save_pretrained(tmp_path / "whole")
    folder = reshard(tmp_path / "whole", tmp_path / "model", expert_of)
    asked, prompts = params(max_new_tokens=6, temperature=0.8, seed=4), PROMPTS[:2]

    def answered(speculation, broken=None):
        """Answers, experts that are in memory then and were before, and how often a pass failed."""
        model = load_moe(folder, expert_memory="100%", predictor=None, step="auto", device="cpu")
        with model.moeflow as runtime, Engine(model, speculation=speculation) as engine:
            use(engine, always(9))
            before = set(runtime.cache.resident())
            if broken is not None:
                with runtime.store.file_of(broken).open("ab") as file:
                    file.write(b"x")
            found = engine.generate(prompts, asked)
            return facts(found), set(runtime.cache.resident()), before, engine.stats()["retries"]

    expected, needed, _, _ = answered(None)
    found, needed_with_drafts, before, retries = answered(NATIVE)
    assert (found, retries) == (expected, 0)
    broken = min(needed_with_drafts - needed - before)
    found, known, _, retries = answered(NATIVE, broken)
    assert found == expected
    assert retries > 0
    assert broken not in known


@pytest.mark.slow
@needs_kernels
def test_programs_that_drafts_need_are_ready_before_the_first_step(tmp_path, caplog):
    tiny_mixtral().save_pretrained(tmp_path / "model")
    options = {"expert_memory": "100%", "predictor": None, "step": "auto", "device": "cpu"}
    model = load_moe(tmp_path / "model", speculation="auto", **options)
    with model.moeflow as runtime, caplog.at_level(logging.INFO, "moeflow.engine.speculation"):
        with Engine(model, speculation=None):
            assert not list(runtime.step.programs)
        with Engine(model):
            assert [runner.num_rows for runner in runtime.step.programs] == [2, 4, 8]
            assert "programs of 2, 4, 8 rows are ready" in caplog.text
        ready = list(runtime.step.programs)
        with Engine(model):
            assert list(runtime.step.programs) == ready


@needs_kernels
def test_an_engine_starts_though_its_programs_cannot_be_made_yet(tmp_path, caplog, monkeypatch):
    """The files are changed on disk behind the model's back, and the experts of a program's first pass not yet read."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))  # where no program of an earlier run is kept
    tiny_mixtral(num_local_experts=64).save_pretrained(tmp_path / "model")
    options = {"expert_memory": "100%", "predictor": None, "step": "auto", "device": "cpu"}
    model = load_moe(tmp_path / "model", speculation="auto", **options)
    with model.moeflow as runtime, caplog.at_level(logging.INFO, "moeflow.engine.speculation"):
        Engine(model, speculation=None).close()
        for file in runtime.store.files:
            with file.open("ab") as opened:
                opened.write(b"x")
        with Engine(model) as engine:
            assert "are made at the first step" in caplog.text
            assert engine.stats()["speculation"]["on"]
