"""OpenAI's gpt-oss: biases, sinks, a window in every second layer, rows of gate and up that take turns.

Knows names and keys.
"""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rules import LAYER, attention, ends, experts, renamed

_PERIOD = 2  # of layers with a window and without


def _config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "gpt-oss")
    if keys.get("rope.freq_base_swa", keys.get("rope.freq_base", 10000.0)) != keys.get("rope.freq_base", 10000.0):
        raise UnsupportedModelError("layers with a window turn by another base, which transformers' gpt-oss has not.")
    # The released models' yarn has fractions of dimensions. llama.cpp rounds them, and files do not tell.
    config = k.decoder_config(keys, tensors, truncates=False)
    pattern = keys.get("attention.sliding_window_pattern", _PERIOD)
    windows = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(keys["block_count"])]
    return {
        **config,
        **k.experts_config(keys, count="num_local_experts", used="num_experts_per_tok", width="intermediate_size"),
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "swiglu_alpha", 1.702)
    k.refuse(config, "swiglu_limit", 7.0)
    k.refuse(config, "attention_bias", True)
    usual = [
        "sliding_attention" if i % _PERIOD < _PERIOD - 1 else "full_attention" for i in range(len(config.layer_types))
    ]
    k.refuse(config, "layer_types", usual)
    more = {
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.sliding_window": config.sliding_window,
    }
    return k.decoder_metadata(config, "gpt-oss", more, truncates=False)


def _rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        Rule(f"{LAYER}.self_attn.sinks", ("blk.{layer}.attn_sinks.weight",)),
        *renamed("post_attention_layernorm", "post_attention_norm"),
        *renamed("mlp.router", "ffn_gate_inp"),
        *experts("mlp.experts", interleaves=True),
    ]


GPT_OSS = Architecture("gpt-oss", "gpt_oss", _config, _metadata, _rules)
