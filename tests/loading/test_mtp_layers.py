"""Layers of multi-token prediction in `generate(use_mtp=True)`: transformers loads them, and answers stay."""

import pytest
import torch
from transformers import modeling_layers

from helpers.engine_requests import generated, tokens
from helpers.mtp_models import with_mtp
from moeflow import load_moe

pytestmark = pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers has no such layers")


@pytest.mark.slow
def test_tokens_with_them_are_those_of_plain_generate_and_the_runtime_holds_none_of_their_experts(
    tmp_path, monkeypatch
):
    prompt = tokens(9, 3)
    model = load_moe(with_mtp(tmp_path / "model", monkeypatch), expert_memory="50%", predictor=None, device="cpu")
    with model.moeflow:
        expected = generated(model, prompt, 16)
        ids, widths = torch.tensor([prompt]), []
        hook = model.model.register_forward_hook(lambda _, asked, made: widths.append(made.last_hidden_state.shape[1]))
        found = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0, use_mtp=True)
        hook.remove()
        assert found[0, len(prompt) :].tolist() == expected
        assert 2 in widths, "no token of theirs was verified"
        assert len(model.moeflow.experts_per_layer) == sum(hasattr(one.mlp, "experts") for one in model.model.layers)
        assert generated(model, prompt, 16) == expected
