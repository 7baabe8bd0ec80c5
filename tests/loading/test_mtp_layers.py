"""Layers of multi-token prediction: transformers loads them for `generate(use_mtp=True)`, and answers stay."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import modeling_layers

from helpers.engine_requests import generated, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow import load_moe

pytestmark = pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers has no such layers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint whose last layer is there once more, as the one that predicts a second token."""
    model, file = build_model(FAMILIES["deepseek_v3"]), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights, last, size = load_file(file), model.config.num_hidden_layers - 1, model.config.hidden_size
    own = f"model.layers.{last + 1}."
    weights |= {own + name.split(".", 3)[3]: one for name, one in weights.items() if f"model.layers.{last}." in name}
    weights |= {f"{own}{name}.weight": torch.ones(size) for name in ("enorm", "hnorm", "shared_head.norm")}
    weights[f"{own}eh_proj.weight"] = torch.cat([torch.eye(size) / 2, torch.eye(size)], 1)
    save_file({name: one.clone() for name, one in weights.items()}, file, metadata={"format": "pt"})
    pattern = own.replace(".", r"\.") + ".*"  # transformers has the number of the real checkpoint's layer
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [pattern])
    return tmp_path


@pytest.mark.slow
def test_answers_with_them_are_those_without_and_their_experts_are_none_of_the_budgets(folder):
    prompt = tokens(9, 3)
    model = load_moe(folder, expert_memory="50%", predictor=None, device="cpu")
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
