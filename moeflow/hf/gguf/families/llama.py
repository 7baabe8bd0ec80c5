"""Architectures whose rows of q and k llama.cpp permutes: Mixtral, and IBM's Granite. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

import torch

from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import Joined
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rope import rope_tensors
from moeflow.hf.gguf.families.rules import LAYER, attention, ends, experts, renamed

_FACTORS = ("longrope", "llama3")
_GRANITE_SCALES = {  # field -> key
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _mixtral_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "llama")
    return {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_local_experts", used="num_experts_per_tok"),
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _mixtral_metadata(config: Any) -> dict[str, Any]:
    k.refuse_window(config)
    more = {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    return k.decoder_metadata(config, "llama", more, factors=_FACTORS)


def _mixtral_rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(permuted=True),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *renamed("mlp.gate", "ffn_gate_inp"),
        *experts("mlp.experts"),
    ]


def _granite_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "granitemoe")
    shared = keys.get("expert_shared_feed_forward_length", 0)
    config = {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_local_experts", used="num_experts_per_tok"),
        **{field: keys.get(key, 1.0) for field, key in _GRANITE_SCALES.items()},
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "architectures": ["GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if not keys.get("attention.scale"):
        config["attention_multiplier"] = config["head_dim"] ** -0.5
    return config | ({"shared_intermediate_size": shared} if shared else {})


def _granite_metadata(config: Any) -> dict[str, Any]:
    more = {key: float(getattr(config, field)) for field, key in _GRANITE_SCALES.items()}
    more |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if getattr(config, "shared_intermediate_size", 0):
        more["expert_shared_feed_forward_length"] = config.shared_intermediate_size
    return k.decoder_metadata(config, "granitemoe", more, factors=_FACTORS)


def _granite_rules(config: Any) -> list[Rule]:
    shared = Joined(lambda config: [config.shared_intermediate_size] * 2)
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(permuted=True),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *renamed("block_sparse_moe.router", "ffn_gate_inp"),
        *experts("block_sparse_moe.experts"),
        Rule(
            f"{LAYER}.shared_mlp.input_linear.weight",
            ("blk.{layer}.ffn_gate_shexp.weight", "blk.{layer}.ffn_up_shexp.weight"),
            shared,
        ),
        *renamed("shared_mlp.output_linear", "ffn_down_shexp"),
    ]


def _factors(config: Any) -> dict[str, torch.Tensor]:
    return rope_tensors(config, k.head_size_of(config))


LLAMA = Architecture("llama", "mixtral", _mixtral_config, _mixtral_metadata, _mixtral_rules, extra=_factors)
GRANITEMOE = Architecture(
    "granitemoe",
    "granitemoe",
    _granite_config,
    _granite_metadata,
    _granite_rules,
    variants=("granitemoeshared",),
    extra=_factors,
)
