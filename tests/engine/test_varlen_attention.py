"""Models whose attention cannot be cut into sequences are refused by their reason."""

import functools

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow.engine.engine import Engine
from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes.forward import KeyValueCache

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
