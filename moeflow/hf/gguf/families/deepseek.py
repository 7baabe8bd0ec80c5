"""DeepSeek's second and third models and what is built like them (Kimi K2, GLM-4.7-Flash). Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import LatentHeads
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.rope import rope_config
from moeflow.hf.gguf.families.routers import needs_bias, router_config, router_metadata, router_rules, scores_of
from moeflow.hf.gguf.families.rules import LAYER, ends, renamed

NAME = "deepseek2"
# llama.cpp's converter multiplies mscale_all_dim by it, in this architecture alone
MSCALE = 0.1


def _config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, NAME)
    if keys.get("attention.temperature_scale"):
        raise UnsupportedModelError("the file scales queries by their positions (attention.temperature_scale).")
    rotated = keys["rope.dimension_count"]
    # files older than the split of attn_kv_b have the lengths of heads under the plain names
    key_length = keys.get("attention.key_length_mla", keys["attention.key_length"])
    config = k.decoder_config(_as_decoder(keys, rotated), tensors) | router_config(keys)
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
    return config | (_third(tensors) if _scores(keys, tensors, config) == k.SIGMOID else _second(config, tensors))


def _as_decoder(keys: k.Keys, rotated: int) -> k.Keys:
    """Return the keys with the lengths of heads, and the scales of positions, that any decoder has."""
    heads = {"key_length": rotated, "value_length": rotated, "head_count_kv": keys["attention.head_count"]}
    dropped = (f"{NAME}.rope.scaling.", "tokenizer.ggml.merges", "tokenizer.ggml.scores")  # the last two take long
    others = {key: keys.metadata[key] for key in keys.metadata if not key.startswith(dropped)}
    return k.Keys(others | {f"{NAME}.attention.{key}": value for key, value in heads.items()}, NAME)


def _scores(keys: k.Keys, tensors: Tensors, config: dict[str, Any]) -> int:
    """Return the scoring function as llama.cpp takes it: the first files of GLM-4.7-Flash lack the key as well."""
    is_flash = config["num_hidden_layers"] in (47, 48) and config["vocab_size"] == 154880
    return scores_of(keys, k.SIGMOID if is_flash else k.SOFTMAX)


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


def _rope_config(keys: k.Keys, tensors: Tensors, rotated: int) -> dict[str, Any]:
    multiplier = f"{NAME}.rope.scaling.yarn_log_multiplier"
    others = {key: value for key, value in keys.metadata.items() if key != multiplier}
    rope = rope_config(k.Keys(others, NAME), tensors, rotated)
    if rope["rope_type"] == "default":
        return rope
    if rope["rope_type"] != "yarn":
        raise UnsupportedModelError(
            f"positions are scaled ({rope['rope_type']}); in this architecture moeflow reads yarn."
        )
    if "attention_factor" in rope or not keys.metadata.get(multiplier):
        raise UnsupportedModelError(
            "yarn in this architecture has rope.scaling.yarn_log_multiplier and no rope.scaling.attn_factor; the file "
            f"has {keys.metadata.get(multiplier)} and {keys.get('rope.scaling.attn_factor')}."
        )
    # one number for both: llama.cpp computes this architecture as if mscale were mscale_all_dim
    mscale = round(keys.metadata[multiplier] / MSCALE, 6)
    return rope | {"mscale": mscale, "mscale_all_dim": mscale}


def _metadata(config: Any) -> dict[str, Any]:
    k.refuse(config, "attention_bias", False)
    k.refuse(config, "mlp_bias", False)
    k.refuse(config, "rope_interleave", True)
    more = router_metadata(config) | {
        # attention as llama.cpp runs it: one head of keys, the latent; the model's own lengths are the `_mla` ones
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
    }
    if config.q_lora_rank is not None:
        more["attention.q_lora_rank"] = config.q_lora_rank
    if config.model_type == "deepseek_v2":
        k.refuse(config, "norm_topk_prob", False, None)
        # llama.cpp ranks groups by their two best experts, this model by the best one
        k.refuse(config, "topk_method", "greedy")
        more |= {"expert_gating_func": k.SOFTMAX, "expert_group_count": 1, "expert_group_used_count": 1}
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "yarn":
        more["rope.scaling.yarn_log_multiplier"] = MSCALE * _both_scales(config.rope_parameters)
    elif kind != "default":
        raise UnsupportedModelError(
            f"positions are scaled ({kind}); llama.cpp scales this architecture's by yarn alone."
        )
    keys = k.decoder_metadata(config, NAME, more)
    keys.pop(f"{NAME}.rope.scaling.attn_factor", None)  # llama.cpp knows it of this architecture
    return keys


def _both_scales(rope: Mapping[str, Any]) -> float:
    """Return yarn's scale of the angles, which must be that of attention."""
    scale = rope.get("mscale_all_dim")
    if not scale or rope.get("mscale") != scale or rope.get("attention_factor"):
        raise UnsupportedModelError(
            "llama.cpp's yarn for this architecture has mscale and mscale_all_dim alike, and no attention_factor; "
            f"the config has {rope.get('mscale')}, {scale} and {rope.get('attention_factor')}."
        )
    return scale


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
    also=("deepseek_v2",),
)
