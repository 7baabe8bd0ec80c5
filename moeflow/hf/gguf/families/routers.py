"""Routers that score experts by sigmoids and choose groups first: their keys, fields and rules.

Knows keys and names. Knows nothing of tensors' values.
"""

from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Rule, Tensors
from moeflow.hf.gguf.families.keys import SIGMOID, SOFTMAX, Keys
from moeflow.hf.gguf.families.rules import LAYER, experts, gated_mlp, renamed

SCORES = {SOFTMAX: "softmax", SIGMOID: "sigmoid"}


def scores_of(keys: Keys, default: int) -> int:
    """Return the number of the function that makes scores; refuses one that transformers' models lack."""
    number = keys.get("expert_gating_func", 0) or default
    if number not in SCORES:
        raise UnsupportedModelError(
            f"the file's experts are scored by function {number} (expert_gating_func); "
            f"moeflow reads {' and '.join(f'{number} ({name})' for number, name in SCORES.items())}."
        )
    return number


def sigmoid_scores(keys: Keys) -> None:
    """Refuse a file whose experts are scored by anything but sigmoids."""
    if (number := scores_of(keys, SIGMOID)) != SIGMOID:
        raise UnsupportedModelError(
            f"the file's experts are scored by {SCORES[number]}; models of this architecture score by sigmoid."
        )


def router_config(keys: Keys) -> dict[str, Any]:
    """Return the fields of DeepSeek's third router and its relatives'. A file without groups has one."""
    return {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "n_routed_experts": keys["expert_count"],
        "n_shared_experts": keys["expert_shared_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 0.0) or 1.0,
        "n_group": keys.get("expert_group_count", 0) or 1,
        "topk_group": keys.get("expert_group_used_count", 0) or 1,
    }


def router_metadata(config: Any) -> dict[str, Any]:
    """Return the keys that `router_config` reads, without the architecture's name in front."""
    return {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_used_count": config.num_experts_per_tok,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": SIGMOID,
        "expert_group_count": config.n_group or 1,
        "expert_group_used_count": config.topk_group or 1,
    }


def router_rules(bias: str = "mlp.gate.e_score_correction_bias", gate: str = "mlp.gate") -> list[Rule]:
    """Return the rules of dense layers, routers, experts and shared experts."""
    return [
        *renamed(gate, "ffn_gate_inp"),
        Rule(f"{LAYER}.{bias}", ("blk.{layer}.exp_probs_b.bias",)),
        *experts("mlp.experts"),
        *gated_mlp("mlp.shared_experts", "_shexp"),
        *gated_mlp("mlp"),
    ]


def needs_bias(tensors: Tensors) -> None:
    """Refuse a file without the correction of scores that its model adds."""
    if not any(name.endswith("exp_probs_b.bias") for name in tensors):
        raise UnsupportedModelError("the file's experts are scored by sigmoid without exp_probs_b; moeflow needs it.")
