"""DeepSeek's second and third models and what is built like them (Kimi K2, GLM-4.7-Flash). Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.families.keys import Keys, decoder_config, decoder_metadata, rope_config
from moeflow.hf.gguf.families.routers import (
    SIGMOID,
    SOFTMAX,
    needs_bias,
    refuse,
    router_config,
    router_metadata,
    router_rules,
    scores_of,
)
from moeflow.hf.gguf.families.rules import LAYER, ends, renamed
from moeflow.hf.gguf.latent_changes import LatentHeads

NAME = "deepseek2"
# llama.cpp's converter multiplies mscale_all_dim by it, in this architecture alone
MSCALE = 0.1


def _config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = Keys(metadata, NAME)
    if keys.get("attention.temperature_scale"):
        raise UnsupportedModelError("the file scales queries by their positions (attention.temperature_scale).")
    rotated = keys["rope.dimension_count"]
    # files older than the split of attn_kv_b have the lengths of heads under the plain names
    key_length = keys.get("attention.key_length_mla", keys["attention.key_length"])
    config = decoder_config(keys, tensors) | router_config(keys)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "rope_parameters": _rope_config(keys, tensors, rotated),
        "q_lora_rank": keys.get("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in tensors else None,
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_nope_head_dim": key_length - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": keys.get("attention.value_length_mla", keys["attention.value_length"]),
    }
    del config["head_dim"]  # transformers computes it
    return config | (_third(tensors) if _scores(keys, tensors, config) == SIGMOID else _second(config, tensors))


def _scores(keys: Keys, tensors: Tensors, config: dict[str, Any]) -> int:
    """Return the scoring function as llama.cpp takes it: the first files of GLM-4.7-Flash lack the key as well."""
    is_flash = config["num_hidden_layers"] in (47, 48) and config["vocab_size"] == 154880
    return scores_of(keys, SIGMOID if is_flash else SOFTMAX)


def _third(tensors: Tensors) -> dict[str, Any]:
    needs_bias(tensors)
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def _second(config: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    if config["norm_topk_prob"]:
        raise UnsupportedModelError("the file's softmax scores are normalised; transformers' DeepSeek V2 never does.")
    if any(name.endswith("exp_probs_b.bias") for name in tensors):
        raise UnsupportedModelError("the file's softmax scores have a correction (exp_probs_b); DeepSeek V2 has none.")
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy" if config["n_group"] > 1 else "greedy",
    }


def _rope_config(keys: Keys, tensors: Tensors, rotated: int) -> dict[str, Any]:
    rope = rope_config(keys, tensors, rotated)
    if rope["rope_type"] != "yarn":
        return rope
    factor = keys.get("rope.scaling.yarn_log_multiplier")
    if not factor:
        raise UnsupportedModelError("the file scales positions by yarn without rope.scaling.yarn_log_multiplier.")
    # llama.cpp has one number for both; it divides attention's scale out of the angles' in this architecture
    mscale = round(factor / MSCALE, 6)
    rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := keys.get(f"rope.scaling.{key}")) is not None:
            rope[name] = value
    return rope


def _metadata(config: Any) -> dict[str, Any]:
    is_third = config.model_type != "deepseek_v2"
    refuse(attention_bias=config.attention_bias, mlp_bias=getattr(config, "mlp_bias", False))
    if is_third and not config.rope_interleave:
        raise UnsupportedModelError("a GGUF file of this architecture cannot say rope_interleave=False.")
    keys: dict[str, Any] = {
        # attention as llama.cpp runs it: one head of keys, the latent; the model's own lengths are the `_mla` ones
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        **_rope_metadata(config.rope_parameters),
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if not is_third:
        refuse(norm_topk_prob=config.norm_topk_prob)
        keys["expert_gating_func"] = SOFTMAX
        if config.topk_method == "greedy":
            keys |= {"expert_group_count": 1, "expert_group_used_count": 1}
    written = {f"{NAME}.{key}": value for key, value in keys.items()}
    return decoder_metadata(config, NAME) | router_metadata(config, NAME) | written


def _rope_metadata(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") != "yarn":
        return {}
    if not rope.get("mscale_all_dim") or rope.get("mscale") != rope["mscale_all_dim"] or rope.get("attention_factor"):
        raise UnsupportedModelError(
            "a GGUF file of this architecture scales positions by yarn with mscale and mscale_all_dim alike; "
            f"the config has {rope.get('mscale')} and {rope.get('mscale_all_dim')}."
        )
    keys = {"rope.scaling.yarn_log_multiplier": MSCALE * rope["mscale_all_dim"]}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if rope.get(name) is not None:
            keys[f"rope.scaling.{key}"] = float(rope[name])
    return keys


def _rules(config: Any) -> list[Rule]:
    both = f"{LAYER}.self_attn.kv_b_proj.weight"
    return [
        *ends(),
        *renamed("input_layernorm", "attn_norm"),
        *renamed("self_attn.q_proj", "attn_q"),
        *renamed("self_attn.q_a_proj", "attn_q_a"),
        *renamed("self_attn.q_a_layernorm", "attn_q_a_norm"),
        *renamed("self_attn.q_b_proj", "attn_q_b"),
        *renamed("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        *renamed("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
        Rule(both, ("blk.{layer}.attn_k_b.weight", "blk.{layer}.attn_v_b.weight"), LatentHeads()),
        Rule(both, ("blk.{layer}.attn_kv_b.weight",)),
        *renamed("self_attn.o_proj", "attn_output"),
        *renamed("post_attention_layernorm", "ffn_norm"),
        *router_rules(),
    ]


DEEPSEEK2 = Architecture(
    NAME,
    "deepseek_v3",
    _config,
    _metadata,
    _rules,
    ignored=(r"blk\.\d+\.nextn\..*",),
    also=("deepseek_v2",),
)
