"""Models that keep state from which no token can be taken back: no drafts, by a reason, and the same answers."""

import pytest
import torch

from helpers.engine_requests import generated, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow import SamplingParams, load_moe
from moeflow.engine.serial.choose_engine import engine_for

PROMPT = tokens(6, 3) * 3  # says again what it said, as prompt lookup likes it


@pytest.fixture(params=["jamba", "qwen3_next"])
def stateful(request, tmp_path):
    build_model(FAMILIES[request.param]).save_pretrained(tmp_path / "model")
    model = load_moe(tmp_path / "model", expert_memory="60%", predictor=None, device="cpu", speculation="auto")
    with model.moeflow:
        yield model


def test_an_engine_says_that_state_is_why_there_are_none(stateful):
    expected = generated(stateful, PROMPT)
    with engine_for(stateful) as engine:
        (found,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=len(expected), ignore_eos=True))
        stats = engine.stats()["speculation"]
    assert found.token_ids == expected
    assert not stats["on"]
    assert "keeps state (LinearAttention" in stats["reason"]


def test_generate_refuses_prompt_lookup_and_answers_as_before(stateful):
    expected = generated(stateful, PROMPT)
    with pytest.raises(ValueError, match="stateful models"):
        stateful.generate(torch.tensor([PROMPT]), prompt_lookup_num_tokens=3, do_sample=False, pad_token_id=0)
    assert generated(stateful, PROMPT) == expected
