"""Qwen's mixture-of-experts models without linear attention. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.families.keys import Keys, decoder_config, decoder_metadata
from moeflow.hf.gguf.families.rules import attention, ends, experts, gated_mlp, renamed


def _qwen3_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = Keys(metadata, "qwen3moe")
    return decoder_config(keys, tensors) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "norm_topk_prob": keys.get("expert_weights_norm", True),
    }


def _qwen3_metadata(config: Any) -> dict[str, Any]:
    return decoder_metadata(config, "qwen3moe") | {
        "qwen3moe.expert_feed_forward_length": config.moe_intermediate_size,
        "qwen3moe.expert_count": config.num_experts,
        "qwen3moe.expert_used_count": config.num_experts_per_tok,
    }


def _qwen3_rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *renamed("mlp.gate", "ffn_gate_inp"),
        *experts("mlp.experts"),
        *gated_mlp("mlp"),
    ]


QWEN3MOE = Architecture("qwen3moe", "qwen3_moe", _qwen3_config, _qwen3_metadata, _qwen3_rules)
