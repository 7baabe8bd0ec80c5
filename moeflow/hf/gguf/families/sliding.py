"""K-EXAONE and Trinity (AFMoE): layers with a window and positions, others without either. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.routers import (
    needs_bias,
    router_config,
    router_rules,
    sigmoid_scores,
)
from moeflow.hf.gguf.families.rules import attention, ends, renamed

WINDOW, FULL = "sliding_attention", "full_attention"
PERIOD = 4  # llama.cpp has no other for AFMoE: every fourth layer has no window and no positions


def _exaone_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "exaone-moe")
    sigmoid_scores(keys)
    needs_bias(tensors)
    config = k.decoder_config(keys, tensors) | router_config(keys)
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    pattern = keys["attention.sliding_window_pattern"]
    if not isinstance(pattern, list):
        raise UnsupportedModelError(f"the file says which layers have a window by {pattern!r}; moeflow reads a list.")
    return config | {
        "model_type": "exaone_moe",
        "architectures": ["ExaoneMoeForCausalLM"],
        "num_experts": config.pop("n_routed_experts"),
        "num_shared_experts": config.pop("n_shared_experts"),
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": [WINDOW if has_window else FULL for has_window in pattern[:layers]],
        "mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(layers)],
    }


def _exaone_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "tie_word_embeddings", False)
    dense = config.mlp_layer_types.count("dense")
    if "sparse" in config.mlp_layer_types[:dense]:
        raise UnsupportedModelError("a GGUF file of exaone-moe has its dense layers first; the config has others.")
    if not config.sliding_window:
        raise UnsupportedModelError("a GGUF file of exaone-moe has a window; the config has none.")
    more = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.num_shared_experts,
        "expert_count": config.num_experts,
        "expert_shared_count": config.num_shared_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": k.SIGMOID,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "leading_dense_block_count": dense,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == WINDOW for kind in config.layer_types],
    }
    return k.decoder_metadata(config, "exaone-moe", more)


def _exaone_rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *router_rules(),
    ]


def _afmoe_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "afmoe")
    sigmoid_scores(keys)
    needs_bias(tensors)
    if not keys.get("expert_weights_norm", False):
        raise UnsupportedModelError("the file's scores are not normalised; transformers' AFMoE always does.")
    if (period := keys.get("attention.sliding_window_pattern", PERIOD)) != PERIOD:
        raise UnsupportedModelError(f"the file's layers without a window come every {period}; moeflow reads {PERIOD}.")
    config = k.decoder_config(keys, tensors)
    return config | {
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "num_shared_experts": keys["expert_shared_count"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "route_scale": keys.get("expert_weights_scale", 0.0) or 1.0,
        "sliding_window": keys["attention.sliding_window"],
        "global_attn_every_n_layers": PERIOD,
        "layer_types": _periodic(config["num_hidden_layers"]),
        "mup_enabled": True,  # llama.cpp multiplies the embeddings of every file
        "attention_bias": False,
    }


def _afmoe_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "attention_bias", False)
    k.refuse(config, "mup_enabled", True)
    k.refuse(config, "layer_types", _periodic(config.num_hidden_layers))
    more = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.num_shared_experts,
        "leading_dense_block_count": config.num_dense_layers,
        "expert_gating_func": k.SIGMOID,
        "expert_weights_norm": True,
        "expert_weights_scale": float(config.route_scale),
        "attention.sliding_window": config.sliding_window,
    }
    return k.decoder_metadata(config, "afmoe", more)


def _periodic(layers: int) -> list[str]:
    return [WINDOW if (layer + 1) % PERIOD else FULL for layer in range(layers)]


def _afmoe_rules(config: Any) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(),
        *renamed("self_attn.gate_proj", "attn_gate"),
        *renamed("post_attention_layernorm", "post_attention_norm"),
        *renamed("pre_mlp_layernorm", "ffn_norm"),
        *renamed("post_mlp_layernorm", "post_ffw_norm"),
        *router_rules("mlp.expert_bias", "mlp.router.gate"),
    ]


EXAONE_MOE = Architecture("exaone-moe", "exaone_moe", _exaone_config, _exaone_metadata, _exaone_rules)
AFMOE = Architecture("afmoe", "afmoe", _afmoe_config, _afmoe_metadata, _afmoe_rules)
