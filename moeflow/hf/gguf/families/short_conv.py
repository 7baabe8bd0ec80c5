"""LFM2's mixture-of-experts models: short convolutions, and attention in some layers. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import Squeeze
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.routers import needs_bias, sigmoid_scores
from moeflow.hf.gguf.families.rules import LAYER, experts, renamed

NAME = "lfm2moe"


def _config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, NAME)
    sigmoid_scores(keys)
    needs_bias(tensors)
    key_heads = keys["attention.head_count_kv"]  # of each layer; a convolution has none
    uniform = {**metadata, f"{NAME}.attention.head_count_kv": max(key_heads)}
    config = k.decoder_config(k.Keys(uniform, NAME), tensors)
    del config["head_dim"]  # transformers divides the width by the heads
    return config | {
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "norm_eps": config.pop("rms_norm_eps"),
        "layer_types": ["full_attention" if heads else "conv" for heads in key_heads],
        "conv_L_cache": keys["shortconv.l_cache"],
        "conv_bias": False,
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "use_expert_bias": True,
        # llama.cpp normalises the scores of every file, and multiplies none
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def _metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "conv_bias", False)
    k.refuse(config, "norm_topk_prob", True)
    k.refuse(config, "routed_scaling_factor", 1)
    k.refuse(config, "use_expert_bias", True)
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    more = {
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "shortconv.l_cache": config.conv_L_cache,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "leading_dense_block_count": config.num_dense_layers,
        "expert_gating_func": k.SIGMOID,
    }
    return k.decoder_metadata(config, NAME, more)


def _rules(config: Any) -> list[Rule]:
    return [
        Rule("model.embed_tokens.weight", ("token_embd.weight",)),
        Rule("model.embedding_norm.weight", ("token_embd_norm.weight",)),
        Rule("lm_head.weight", ("output.weight",)),
        *renamed("operator_norm", "attn_norm"),
        *(rule for part in "qkv" for rule in renamed(f"self_attn.{part}_proj", f"attn_{part}")),
        *renamed("self_attn.out_proj", "attn_output"),
        *renamed("self_attn.q_layernorm", "attn_q_norm"),
        *renamed("self_attn.k_layernorm", "attn_k_norm"),
        *renamed("conv.conv", "shortconv.conv", Squeeze(1, 3)),
        *renamed("conv.in_proj", "shortconv.in_proj"),
        *renamed("conv.out_proj", "shortconv.out_proj"),
        *renamed("ffn_norm", "ffn_norm"),
        *renamed("feed_forward.w1", "ffn_gate"),
        *renamed("feed_forward.w3", "ffn_up"),
        *renamed("feed_forward.w2", "ffn_down"),
        *renamed("feed_forward.gate", "ffn_gate_inp"),
        Rule(f"{LAYER}.feed_forward.expert_bias", ("blk.{layer}.exp_probs_b.bias",)),
        *experts("feed_forward.experts"),
    ]


LFM2MOE = Architecture(NAME, "lfm2_moe", _config, _metadata, _rules)
