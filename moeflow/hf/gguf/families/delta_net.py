"""Qwen3-Next and Qwen3.5: gated delta nets, and attention with a gate in every few layers. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import (
    GroupedProjections,
    InTurn,
    LogNegate,
    PlusOne,
    Squeeze,
    ValueHeadColumns,
    ValueHeadRows,
)
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rules import LAYER, ends, experts, gated_mlp, renamed

LINEAR, FULL = "linear_attention", "full_attention"
DELTA = f"{LAYER}.linear_attn"
SECTIONS = [11, 11, 10]  # of the rotated dimensions, where a config does not say


def _config(metadata: Mapping[str, Any], tensors: Tensors, name: str) -> dict[str, Any]:
    keys = k.Keys(metadata, name)
    config = k.decoder_config(keys, tensors)
    config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # transformers' default is another
    value_heads = keys["ssm.time_step_rank"]
    return config | {
        "layer_types": _layer_types(keys, config["num_hidden_layers"]),
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": keys["ssm.inner_size"] // value_heads,
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "attention_bias": False,
    }


def _layer_types(keys: k.Keys, layers: int) -> list[str]:
    """Return which layers are linear: listed in newer files, every one but each fourth or so in the others."""
    linear = keys.get("attention.recurrent_layers")
    if linear is None:
        interval = keys.get("full_attention_interval", 4)
        linear = [(layer + 1) % interval != 0 for layer in range(layers)]
    return [LINEAR if is_linear else FULL for is_linear in linear[:layers]]


def _metadata(config: Any, name: str) -> dict[str, Any]:
    k.refuse(config, "attention_bias", False)
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise UnsupportedModelError(
            f"a GGUF file of {name} has linear heads of one size; the config has keys of "
            f"{config.linear_key_head_dim} and values of {config.linear_value_head_dim}."
        )
    more = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        **_layer_keys(config.layer_types),
    }
    return k.decoder_metadata(config, name, more)


def _layer_keys(kinds: list[str]) -> dict[str, Any]:
    linear = [kind == LINEAR for kind in kinds]
    interval = linear.index(False) + 1 if False in linear else len(linear) + 1
    if linear == [(layer + 1) % interval != 0 for layer in range(len(linear))]:
        return {"full_attention_interval": interval}
    return {"attention.recurrent_layers": linear}


def _qwen3_next_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    return _config(metadata, tensors, "qwen3next") | {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "norm_topk_prob": True,  # llama.cpp normalises the scores of every file
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_next_metadata(config: Any) -> dict[str, Any]:
    k.refuse_dense_layers(config)
    k.refuse(config, "norm_topk_prob", True)
    return _metadata(config, "qwen3next")


def _qwen35_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    config = _config(metadata, tensors, "qwen35moe")
    sections = k.Keys(metadata, "qwen35moe")["rope.dimension_sections"]
    config["rope_parameters"] |= {"mrope_section": [size for size in sections if size], "mrope_interleaved": True}
    return config | {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}


def _qwen35_metadata(config: Any) -> dict[str, Any]:
    sections = [*config.rope_parameters.get("mrope_section", SECTIONS), 0, 0, 0, 0][:4]
    return _metadata(config, "qwen35moe") | {"qwen35moe.rope.dimension_sections": sections}


def _rules(config: Any) -> list[Rule]:
    """Return the rules of all but linear attention, whose norms alone hold their weights as they are."""
    plus_one = PlusOne()
    return [
        Rule("model.norm.weight", ("output_norm.weight",), plus_one),
        *ends(),
        *renamed("input_layernorm", "attn_norm", plus_one),
        *renamed("post_attention_layernorm", "post_attention_norm", plus_one),
        *renamed("self_attn.q_norm", "attn_q_norm", plus_one),
        *renamed("self_attn.k_norm", "attn_k_norm", plus_one),
        *(rule for part in "qkv" for rule in renamed(f"self_attn.{part}_proj", f"attn_{part}")),
        *renamed("self_attn.o_proj", "attn_output"),
        *renamed("mlp.gate", "ffn_gate_inp"),
        *experts("mlp.experts"),
        *gated_mlp("mlp.shared_expert", "_shexp"),
        *renamed("mlp.shared_expert_gate", "ffn_gate_inp_shexp", Squeeze(0, 2)),
        *renamed("linear_attn.norm", "ssm_norm"),
    ]


def _qwen3_next_rules(config: Any) -> list[Rule]:
    joined = f"{DELTA}.in_proj_qkvz.weight"
    return [
        *_rules(config),
        Rule(joined, ("blk.{layer}.attn_qkv.weight", "blk.{layer}.attn_gate.weight"), GroupedProjections()),
        Rule(joined, ("blk.{layer}.ssm_in.weight",)),  # the first files have it as it is
        *renamed("linear_attn.in_proj_ba", "ssm_ba"),
        *renamed("linear_attn.conv1d", "ssm_conv1d", Squeeze(1, 3)),
        Rule(f"{DELTA}.dt_bias", ("blk.{layer}.ssm_dt.bias",)),
        Rule(f"{DELTA}.A_log", ("blk.{layer}.ssm_a",), LogNegate()),
        *renamed("linear_attn.out_proj", "ssm_out"),
    ]


def _qwen35_rules(config: Any) -> list[Rule]:
    heads, rows = ValueHeadRows(whole=False), ValueHeadRows(whole=True)
    after_keys = ValueHeadRows(whole=True, after=_query_and_key_rows)
    return [
        *_rules(config),
        *renamed("linear_attn.in_proj_qkv", "attn_qkv", after_keys),
        *renamed("linear_attn.in_proj_z", "attn_gate", rows),
        *renamed("linear_attn.in_proj_a", "ssm_alpha", heads),
        *renamed("linear_attn.in_proj_b", "ssm_beta", heads),
        *renamed("linear_attn.conv1d", "ssm_conv1d", InTurn(Squeeze(1, 3), after_keys)),
        Rule(f"{DELTA}.dt_bias", ("blk.{layer}.ssm_dt.bias",), heads),
        Rule(f"{DELTA}.A_log", ("blk.{layer}.ssm_a",), InTurn(LogNegate(), heads)),
        *renamed("linear_attn.out_proj", "ssm_out", ValueHeadColumns()),
    ]


def _query_and_key_rows(config: Any) -> int:
    return 2 * config.linear_key_head_dim * config.linear_num_key_heads


QWEN3NEXT = Architecture("qwen3next", "qwen3_next", _qwen3_next_config, _qwen3_next_metadata, _qwen3_next_rules)
QWEN35MOE = Architecture("qwen35moe", "qwen3_5_moe_text", _qwen35_config, _qwen35_metadata, _qwen35_rules)
