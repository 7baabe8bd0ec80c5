"""Qwen's mixture-of-experts models without linear attention. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import Squeeze
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rules import attention, ends, experts, gated_mlp, renamed


def _qwen2_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "qwen2moe")
    config = k.decoder_config(keys, tensors)
    return {
        **config,
        **k.experts_config(keys, count="num_experts", used="num_experts_per_tok", width="moe_intermediate_size"),
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": keys.get("expert_shared_feed_forward_length", config["intermediate_size"]),
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
    }


def _qwen2_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "norm_topk_prob", False)
    k.refuse_other_width(config)
    k.refuse(config, "sliding_window", None, 0)
    k.refuse_dense_layers(config)
    more = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    return k.decoder_metadata(config, "qwen2moe", more)


def _qwen2_rules(config: Any) -> list[Rule]:
    return [
        *_qwen3_rules(config),
        *gated_mlp("mlp.shared_expert", "_shexp"),
        *renamed("mlp.shared_expert_gate", "ffn_gate_inp_shexp", Squeeze(0, 2)),
    ]


def _qwen3_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "qwen3moe")
    return {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_experts", used="num_experts_per_tok", width="moe_intermediate_size"),
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _qwen3_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "norm_topk_prob", True)
    k.refuse(config, "sliding_window", None, 0)
    k.refuse(config, "attention_bias", False)
    k.refuse_dense_layers(config)
    more = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    return k.decoder_metadata(config, "qwen3moe", more)


def _qwen3_rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *renamed("mlp.gate", "ffn_gate_inp"),
        *experts("mlp.experts"),
    ]


QWEN2MOE = Architecture("qwen2moe", "qwen2_moe", _qwen2_config, _qwen2_metadata, _qwen2_rules)
QWEN3MOE = Architecture("qwen3moe", "qwen3_moe", _qwen3_config, _qwen3_metadata, _qwen3_rules)
