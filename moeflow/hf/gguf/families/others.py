"""Architectures of one family each: OLMoE, Phi, MiniMax, ERNIE, Hunyuan. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import Squeeze
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rope import rope_tensors
from moeflow.hf.gguf.families.rules import LAYER, attention, ends, experts, gated_mlp, renamed


def _decoder(router: str, norms: tuple[str, str] = ("q_norm", "k_norm")) -> list[Rule]:
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *attention(norms=norms),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *renamed(router, "ffn_gate_inp"),
        *experts("mlp.experts"),
    ]


def _olmoe_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "olmoe")
    return {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_experts", used="num_experts_per_tok"),
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "norm_topk_prob": False,
        "clip_qkv": keys.get("attention.clamp_kqv"),
    }


def _olmoe_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "norm_topk_prob", False)
    k.refuse(config, "clip_qkv", None)
    k.refuse(config, "num_key_value_heads", config.num_attention_heads)
    k.refuse_other_width(config)
    k.refuse(config, "attention_bias", False)
    more = {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    return k.decoder_metadata(config, "olmoe", more)


def _phimoe_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "phimoe")
    config = {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_local_experts", used="num_experts_per_tok"),
        "model_type": "phimoe",
        "architectures": ["PhimoeForCausalLM"],
        "sliding_window": keys.get("attention.sliding_window") or None,
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "lm_head_bias": "output.bias" in tensors,
    }
    rope = config["rope_parameters"]
    if rope["rope_type"] == "longrope":
        rope |= {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}
    return config


def _phimoe_metadata(config: Any) -> dict[str, Any]:
    k.refuse_window(config)
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "attention_bias", True)  # llama.cpp wants the tensors
    k.refuse(config, "lm_head_bias", True)
    k.refuse_other_width(config)
    more = {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.sliding_window": 0,
    }
    return k.decoder_metadata(config, "phimoe", more, factors=("longrope",))


def _phimoe_factors(config: Any) -> dict[str, torch.Tensor]:
    return rope_tensors(config, k.head_size_of(config))


def _minimax_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "minimax-m2")
    if keys.get("expert_gating_func", k.SIGMOID) != k.SIGMOID:
        raise UnsupportedModelError("minimax-m2.expert_gating_func is not sigmoid, which transformers' family has.")
    return {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_local_experts", used="num_experts_per_tok", width="intermediate_size"),
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
    }


def _minimax_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    more = {
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_gating_func": k.SIGMOID,
    }
    return k.decoder_metadata(config, "minimax-m2", more)


def _minimax_rules(config: Any) -> list[Rule]:
    return [
        *_decoder("mlp.gate"),
        Rule(f"{LAYER}.mlp.e_score_correction_bias", ("blk.{layer}.exp_probs_b.bias",)),
    ]


def _ernie_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "ernie4_5-moe")
    config = {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="moe_num_experts", used="moe_k", width="moe_intermediate_size"),
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_layer_start_index": keys.get("leading_dense_block_count", 0),
        "moe_layer_interval": keys["interleave_moe_layer_step"],
        "moe_num_shared_experts": keys.get("expert_shared_count", 0),
        "use_bias": "blk.0.attn_q.bias" in tensors,
    }
    return config | {"moe_layer_end_index": config["num_hidden_layers"] - 1}


def _ernie_metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "moe_layer_interval", 1)
    k.refuse(config, "moe_layer_end_index", config.num_hidden_layers - 1)
    k.refuse(config, "use_bias", False)
    more = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
    }
    return k.decoder_metadata(config, "ernie4_5-moe", more)


def _ernie_rules(config: Any) -> list[Rule]:
    return [
        *_decoder("mlp.gate"),
        *gated_mlp("mlp"),
        *gated_mlp("mlp.shared_experts", "_shexp"),
        Rule(f"{LAYER}.mlp.gate.moe_statics.e_score_correction_bias", ("blk.{layer}.exp_probs_b.bias",), Squeeze(0, 2)),
    ]


def _hunyuan_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, "hunyuan-moe")
    config = {
        **k.decoder_config(keys, tensors),
        **k.experts_config(keys, count="num_experts", used="moe_topk"),
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    width = config["intermediate_size"]
    widths = {keys.one("expert_feed_forward_length"), keys.get("expert_shared_feed_forward_length", width)}
    if widths != {width}:
        raise UnsupportedModelError(f"experts are {sorted(widths)} wide; transformers' family has one width, {width}.")
    return config


def _hunyuan_metadata(config: Any) -> dict[str, Any]:
    top_k = config.moe_topk if isinstance(config.moe_topk, int) else config.moe_topk[0]
    k.refuse(config, "hidden_act", "silu")
    k.refuse(config, "moe_topk", top_k, [top_k] * config.num_hidden_layers)
    k.refuse(config, "attention_bias", False)
    more = {
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.intermediate_size,
        "expert_shared_count": 1,
        "expert_count": config.num_experts,
        "expert_used_count": top_k,
    }
    rope = config.rope_parameters
    if rope.get("rope_type") == "dynamic" and rope.get("alpha"):  # nothing dynamic: a larger base
        size = k.head_size_of(config)
        more |= {
            "rope.freq_base": rope["rope_theta"] * rope["alpha"] ** (size / (size - 2)),
            "rope.scaling.type": "none",
        }
        config = _WithRope(config, {"rope_type": "default", "rope_theta": rope["rope_theta"]})
    return k.decoder_metadata(config, "hunyuan-moe", more)


class _WithRope:
    """A config with other `rope_parameters`."""

    def __init__(self, config: Any, rope: dict[str, Any]) -> None:
        self._config, self.rope_parameters = config, rope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _hunyuan_rules(config: Any) -> list[Rule]:
    return [
        *_decoder("mlp.gate.wg", ("query_layernorm", "key_layernorm")),
        *gated_mlp("mlp.shared_mlp", "_shexp"),
    ]


OLMOE = Architecture("olmoe", "olmoe", _olmoe_config, _olmoe_metadata, lambda config: _decoder("mlp.gate"))
PHIMOE = Architecture(
    "phimoe",
    "phimoe",
    _phimoe_config,
    _phimoe_metadata,
    lambda config: _decoder("mlp.router"),
    extra=_phimoe_factors,
)
MINIMAX_M2 = Architecture("minimax-m2", "minimax_m2", _minimax_config, _minimax_metadata, _minimax_rules)
ERNIE4_5_MOE = Architecture("ernie4_5-moe", "ernie4_5_moe", _ernie_config, _ernie_metadata, _ernie_rules)
HUNYUAN_MOE = Architecture("hunyuan-moe", "hunyuan_v1_moe", _hunyuan_config, _hunyuan_metadata, _hunyuan_rules)
