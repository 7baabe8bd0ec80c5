"""Drafts of a model's layers of multi-token prediction: the answers stay, and their experts lie in the budget."""

import logging
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, cache_utils, modeling_layers

from helpers.engine_requests import GREEDY, PROMPTS, assert_empty, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_config, build_model
from helpers.mtp_models import chain_model, with_mtp
from helpers.prequantized_models import FP8
from helpers.small_models import tiny_mixtral
from moeflow import Engine, SamplingParams, load_moe
from moeflow.convert.pack import pack_model
from moeflow.engine.speculation.mtp import MtpSource
from moeflow.errors import ConfigError
from moeflow.kernels.cpu.library import instruction_set

pytestmark = [
    pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built"),
    pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers has no such layers"),
]
SMALL = {"max_batch_size": 2, "max_step_tokens": 4}  # prompts come in pieces, and few programs are made
MTP = {"sources": ("mtp",), "gated": False}
LONG = SamplingParams(max_new_tokens=16, ignore_eos=True)


def loaded(folder, **options):
    return load_moe(folder, **{"expert_memory": "50%", "predictor": None, "device": "cpu", **options})


def answered(model, params, prompts=PROMPTS[:2], **options):
    """The tokens of answers, and what speculation counted of the source."""
    with Engine(model, **SMALL, **options) as engine:
        completions = engine.generate(prompts, params)
        assert [one.error for one in completions] == [None] * len(prompts)
        assert_empty(engine)
        found = engine.stats()["speculation"]
    return [one.token_ids for one in completions], found["sources"].get("mtp")


@pytest.fixture
def drafts(monkeypatch):
    """What each proposal followed, and what it was."""
    seen, propose = [], MtpSource.propose

    def watched(self, sequence, most):
        draft = propose(self, sequence, most)
        seen.append((sequence.tokens_from(0), draft.tokens))
        return draft

    monkeypatch.setattr(MtpSource, "propose", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("num_layers", "predictor"), [(1, "lookahead"), (2, None)])
def test_answers_are_those_without_and_experts_stay_in_the_budget(num_layers, predictor, tmp_path, monkeypatch):
    folder = with_mtp(tmp_path / "model", monkeypatch, num_layers)
    sampled = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, seed=7)
    with (plain := loaded(folder, predictor=predictor)).moeflow:
        expected = [answered(plain, params, speculation=None)[0] for params in (LONG, sampled)]
        num_own = len(plain.moeflow.experts_per_layer)
    with (model := loaded(folder, predictor=predictor, speculation=MTP)).moeflow as runtime:
        for params, answers in zip((LONG, sampled), expected, strict=True):
            found, counts = answered(model, params)
            assert found == answers
            assert counts["proposed"] > 0, counts
        memory = runtime.stats()["memory"]
        assert memory["device_peak_bytes"] <= memory["expert_budget_bytes"] <= memory["all_experts_bytes"] // 2
        assert len(runtime.experts_per_layer) == num_own + num_layers
        assert {key.layer for key in runtime.cache.resident()} <= set(range(num_own + num_layers))
        runtime.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "num_layers"), [("glm4_moe", 1), ("deepseek_v3", 2)])
def test_drafts_are_what_transformers_layers_say_of_the_whole_text(family, num_layers, tmp_path, monkeypatch, drafts):
    """Whatever was accepted before, and in however many pieces the prompt came."""
    folder = with_mtp(tmp_path / "model", monkeypatch, num_layers, family=family)
    with (model := loaded(folder, speculation=MTP)).moeflow:
        answered(model, SamplingParams(max_new_tokens=12, ignore_eos=True), [tokens(21, 3)])
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = modeling_layers.MtpModel.from_pretrained(whole).eval()
    assert len(drafts) > 5
    for ids, drafted in drafts:
        assert drafted, "the first step behind a prompt is no native one, and all others have what they need"
        with torch.no_grad():
            hidden = whole.model(torch.tensor([ids[:-1]])).last_hidden_state
            positions = torch.arange(1, len(ids))[None]
            said, _, _ = layers(torch.tensor([ids[1:]]), hidden, None, positions, cache_utils.MtpCache())
        assert list(drafted[:num_layers]) == said[0, : len(drafted)].tolist()


@pytest.mark.slow
def test_what_layers_say_rightly_is_accepted_and_the_last_one_goes_on(tmp_path, monkeypatch, drafts):
    folder = with_mtp(tmp_path / "model", monkeypatch, model=chain_model())
    with (model := loaded(folder)).moeflow:
        expected, _ = answered(model, LONG, speculation=None)
    with (model := loaded(folder, speculation=MTP)).moeflow:
        found, counts = answered(model, LONG)
    assert found == expected
    assert counts["accepted"] > 0.9 * counts["proposed"] > 0
    assert max(len(draft) for _, draft in drafts) > 1, "one layer says one token, and goes on where that is likely"


@pytest.mark.slow
def test_prompt_whose_beginning_was_kept_has_drafts_too(tmp_path, monkeypatch):
    folder = with_mtp(tmp_path / "model", monkeypatch, model=chain_model())
    with (model := loaded(folder, speculation=MTP)).moeflow, Engine(model, **SMALL) as engine:
        first, second = tokens(40, 1), tokens(3, 2)
        (one,) = engine.generate([first], GREEDY)
        before = engine.stats()["speculation"]["sources"]["mtp"]["accepted"]
        (two,) = engine.generate([first + one.token_ids + second], GREEDY)
        assert engine.stats()["shared_tokens"] > 40
        assert engine.stats()["speculation"]["sources"]["mtp"]["accepted"] > before
        with Engine(model, speculation=None, **SMALL) as plain:
            assert plain.generate([first + one.token_ids + second], GREEDY)[0].token_ids == two.token_ids


@pytest.mark.slow
def test_expert_that_cannot_be_read_ends_the_drafts_and_no_answer(tmp_path, monkeypatch, caplog):
    folder = with_mtp(tmp_path / "model", monkeypatch)
    with (model := loaded(folder)).moeflow:
        expected, _ = answered(model, LONG, speculation=None)
    with (model := loaded(folder, speculation=MTP)).moeflow, caplog.at_level(logging.WARNING):
        os.truncate(folder / "model-2.safetensors", 4096)
        found, counts = answered(model, LONG)
        assert found == expected
        assert "ExpertReadError" in counts["reason"]
        assert len([one for one in caplog.records if "drafts of mtp are off" in one.getMessage()]) == 1


def test_models_without_them_are_refused_with_the_reason(tmp_path, monkeypatch):
    tiny_mixtral().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ConfigError, match=r"'mtp'.*transformers makes none for MixtralForCausalLM"):
        loaded(tmp_path / "mixtral", speculation=MTP)
    build_model(FAMILIES["deepseek_v3"]).save_pretrained(tmp_path / "cut")
    with pytest.raises(ConfigError, match=r"'mtp'.*cut has no weights of them"):
        loaded(tmp_path / "cut", speculation=MTP)
    folder = with_mtp(tmp_path / "model", monkeypatch)
    quantised = build_config(FAMILIES["deepseek_v3"])
    quantised.quantization_config = FP8
    with pytest.raises(ConfigError, match=r"'mtp'.*whose weights are floats"):
        loaded(folder, config=quantised, speculation=MTP)
    pack_model(folder, tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"'mtp'.*not packed"):
        loaded(tmp_path / "packed", speculation=MTP)
    with (model := loaded(folder)).moeflow, pytest.raises(ConfigError, match=r"'mtp'.*was loaded without them"):
        Engine(model, speculation=MTP)
