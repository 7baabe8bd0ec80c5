"""Nemotron 3: each layer is a state space, an attention without positions, or experts. Knows names and keys."""

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Architecture, Rule, Tensors
from moeflow.hf.gguf.changes import InTurn, LogNegate, Reshaped, Squeeze
from moeflow.hf.gguf.families import keys as k
from moeflow.hf.gguf.families.routers import needs_bias
from moeflow.hf.gguf.families.rules import LAYER, renamed

NAME = "nemotron_h_moe"
STATE, FULL, EXPERTS = "linear_attention", "full_attention", "moe"


def _config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    keys = k.Keys(metadata, NAME)
    needs_bias(tensors)
    layers = keys["block_count"] - keys.get("nextn_predict_layers", 0)
    key_heads, widths = keys["attention.head_count_kv"], keys["feed_forward_length"]
    states = keys["ssm.time_step_rank"]
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": [
            EXPERTS if width else FULL if heads else STATE
            for heads, width in zip(key_heads[:layers], widths[:layers], strict=True)
        ],
        "hidden_size": keys["embedding_length"],
        "num_attention_heads": keys.one("attention.head_count"),
        "num_key_value_heads": max(key_heads),
        "head_dim": keys["attention.key_length"],
        "max_position_embeddings": keys["context_length"],
        "layer_norm_epsilon": keys["attention.layer_norm_rms_epsilon"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": False,  # transformers has two parameters in any case
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "conv_kernel": keys["ssm.conv_kernel"],
        "ssm_state_size": keys["ssm.state_size"],
        "n_groups": keys["ssm.group_count"],
        "mamba_num_heads": states,
        "mamba_head_dim": keys["ssm.inner_size"] // states,
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in tensors),
        "n_routed_experts": keys["expert_count"],
        "n_shared_experts": keys["expert_shared_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "moe_shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "moe_latent_size": keys.get("moe_latent_size"),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 0.0) or 1.0,
        "n_group": keys.get("expert_group_count", 0) or 1,
        "topk_group": keys.get("expert_group_used_count", 0) or 1,
        "num_nextn_predict_layers": 0,
    }


def _metadata(config: Any) -> dict[str, Any]:
    for field in ("use_bias", "mlp_bias", "attention_bias"):
        k.refuse(config, field, False)
    k.refuse(config, "tie_word_embeddings", False)
    k.refuse(config, "use_conv_bias", True)  # llama.cpp crashes without
    k.refuse_window(config)
    k.refuse(config, "mlp_hidden_act", "relu2")
    k.refuse(config, "mamba_hidden_act", "silu")
    if "mlp" in config.layers_block_type:
        raise UnsupportedModelError(f"a GGUF file of {NAME} has no layers of a dense MLP; the config has some.")
    kinds = config.layers_block_type
    keys = {
        "block_count": len(kinds),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads if kind == FULL else 0 for kind in kinds],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),  # llama.cpp wants it and does not use it
        "rope.scaling.finetuned": False,
        "feed_forward_length": [config.moe_intermediate_size if kind == EXPERTS else 0 for kind in kinds],
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.time_step_rank": config.mamba_num_heads,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    if config.moe_latent_size is not None:
        keys["moe_latent_size"] = config.moe_latent_size
    return {f"{NAME}.{key}": value for key, value in keys.items()}


def _rules(config: Any) -> list[Rule]:
    mixer = f"{LAYER}.mixer"
    column = Reshaped(lambda config: (config.mamba_num_heads, 1))
    return [
        Rule("model.embeddings.weight", ("token_embd.weight",)),
        Rule("model.norm_f.weight", ("output_norm.weight",)),
        Rule("lm_head.weight", ("output.weight",)),
        Rule("lm_head.weight", ("token_embd.weight",)),
        *renamed("norm", "attn_norm"),
        *(rule for part in "qkv" for rule in renamed(f"mixer.{part}_proj", f"attn_{part}")),
        *renamed("mixer.o_proj", "attn_output"),
        *renamed("mixer.in_proj", "ssm_in"),
        Rule(f"{mixer}.conv1d.weight", ("blk.{layer}.ssm_conv1d.weight",), Squeeze(1, 3)),
        Rule(f"{mixer}.conv1d.bias", ("blk.{layer}.ssm_conv1d.bias",)),
        Rule(f"{mixer}.dt_bias", ("blk.{layer}.ssm_dt.bias",)),
        Rule(f"{mixer}.A_log", ("blk.{layer}.ssm_a",), InTurn(column, LogNegate())),
        Rule(f"{mixer}.D", ("blk.{layer}.ssm_d",), column),
        Rule(f"{mixer}.norm.weight", ("blk.{layer}.ssm_norm.weight",), Reshaped(lambda config: (config.n_groups, -1))),
        *renamed("mixer.out_proj", "ssm_out"),
        *renamed("mixer.gate", "ffn_gate_inp"),
        Rule(f"{mixer}.gate.e_score_correction_bias", ("blk.{layer}.exp_probs_b.bias",)),
        Rule(f"{mixer}.experts.up_proj", ("blk.{layer}.ffn_up_exps.weight",)),
        Rule(f"{mixer}.experts.down_proj", ("blk.{layer}.ffn_down_exps.weight",)),
        *renamed("mixer.shared_experts.up_proj", "ffn_up_shexp"),
        *renamed("mixer.shared_experts.down_proj", "ffn_down_shexp"),
        *renamed("mixer.fc1_latent_proj", "ffn_latent_down"),
        *renamed("mixer.fc2_latent_proj", "ffn_latent_up"),
    ]


NEMOTRON_H_MOE = Architecture(NAME, "nemotron_h", _config, _metadata, _rules)
