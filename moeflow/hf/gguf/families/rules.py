"""Rules that most architectures share. Of several for one parameter, the first is the one written.

Knows names. Knows nothing of keys.
"""

from typing import Any

from moeflow.hf.gguf.architecture import Change, Rule, Same
from moeflow.hf.gguf.changes import RowsOf

LAYER = "model.layers.{layer}"


def renamed(parameter: str, tensor: str, change: Change = Same(), *, layer: str = LAYER) -> list[Rule]:
    """Return the rules of a module's weight and bias: `self_attn.q_proj` is `attn_q`."""
    return [
        Rule(f"{layer}.{parameter}.{kind}", (f"blk.{{layer}}.{tensor}.{kind}",), change) for kind in ("weight", "bias")
    ]


def ends() -> list[Rule]:
    """Return the rules of what comes before and after the layers."""
    return [
        Rule("model.embed_tokens.weight", ("token_embd.weight",)),
        *(Rule(f"model.norm.{kind}", (f"output_norm.{kind}",)) for kind in ("weight", "bias")),
        *(Rule(f"lm_head.{kind}", (f"output.{kind}",)) for kind in ("weight", "bias")),
    ]


def attention(query: Change = Same(), key: Change = Same(), *, output: str = "o_proj") -> list[Rule]:
    """Return the rules of an attention with q, k and v, apart or in one tensor, with norms of q and k or without."""
    rules = [
        *renamed("self_attn.q_proj", "attn_q", query),
        *renamed("self_attn.k_proj", "attn_k", key),
        *renamed("self_attn.v_proj", "attn_v"),
        *renamed(f"self_attn.{output}", "attn_output"),
        *renamed("self_attn.q_norm", "attn_q_norm"),
        *renamed("self_attn.k_norm", "attn_k_norm"),
    ]
    if isinstance(query, Same):  # llama.cpp's converter can join them; it never does where it permutes
        for part, name in enumerate(("q", "k", "v")):
            rules += renamed(f"self_attn.{name}_proj", "attn_qkv", RowsOf(part, query_key_value_rows))
    return rules


def query_key_value_rows(config: Any) -> list[int]:
    """Return the rows of q, k and v."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_size
    return [config.num_attention_heads * head_size, keys, keys]


def gated_mlp(module: str, suffix: str = "") -> list[Rule]:
    """Return the rules of a dense MLP, or, with a suffix of the tensors, of a shared expert."""
    return [rule for part in ("gate", "up", "down") for rule in renamed(f"{module}.{part}_proj", f"ffn_{part}{suffix}")]


def experts(module: str) -> list[Rule]:
    """Return the rules of an experts module: a stack for gate and up each, one for both, or a tensor for each expert."""
    gate_up, down = f"{LAYER}.{module}.gate_up_proj", f"{LAYER}.{module}.down_proj"
    return [
        Rule(gate_up, ("blk.{layer}.ffn_gate_exps.weight", "blk.{layer}.ffn_up_exps.weight")),
        Rule(gate_up, ("blk.{layer}.ffn_gate_up_exps.weight",)),
        Rule(gate_up, ("blk.{layer}.ffn_gate.{expert}.weight", "blk.{layer}.ffn_up.{expert}.weight")),
        Rule(down, ("blk.{layer}.ffn_down_exps.weight",)),
        Rule(down, ("blk.{layer}.ffn_down.{expert}.weight",)),
    ]
