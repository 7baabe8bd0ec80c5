"""Rules that most architectures share. Of several for one parameter, the first is the one written.

Knows names. Knows nothing of keys.
"""

from typing import Any

from moeflow.hf.gguf.architecture import Change, Rule, Same
from moeflow.hf.gguf.changes import PermuteForRope, RowsOf
from moeflow.hf.gguf.families.keys import head_size_of

LAYER = "model.layers.{layer}"
SAME = Same()


def renamed(parameter: str, tensor: str, change: Change = SAME) -> list[Rule]:
    """Return the rules of a layer's module with a weight and a bias: `self_attn.q_proj` is `attn_q`."""
    return [
        Rule(f"{LAYER}.{parameter}.{kind}", (f"blk.{{layer}}.{tensor}.{kind}",), change) for kind in ("weight", "bias")
    ]


def ends() -> list[Rule]:
    """Return the rules of what comes before and after the layers."""
    return [
        Rule("model.embed_tokens.weight", ("token_embd.weight",)),
        *(Rule(f"model.norm.{kind}", (f"output_norm.{kind}",)) for kind in ("weight", "bias")),
        *(Rule(f"lm_head.{kind}", (f"output.{kind}",)) for kind in ("weight", "bias")),
    ]


def attention(*, permuted: bool = False, norms: tuple[str, str] = ("q_norm", "k_norm")) -> list[Rule]:
    """Return the rules of an attention: q, k and v apart or in one tensor, norms of q and k where a model has them.

    Args:
        permuted: whether llama.cpp turns neighbours, for which its converter permutes the rows of q and k.
        norms: the modules' names.
    """
    query = PermuteForRope(lambda config: config.num_attention_heads) if permuted else SAME
    key = PermuteForRope(lambda config: config.num_key_value_heads) if permuted else SAME
    rules = [
        *renamed("self_attn.q_proj", "attn_q", query),
        *renamed("self_attn.k_proj", "attn_k", key),
        *renamed("self_attn.v_proj", "attn_v"),
        *renamed("self_attn.o_proj", "attn_output"),
        *renamed(f"self_attn.{norms[0]}", "attn_q_norm"),
        *renamed(f"self_attn.{norms[1]}", "attn_k_norm"),
    ]
    for part, (name, change) in enumerate((("q", query), ("k", key), ("v", SAME))):
        rules += renamed(f"self_attn.{name}_proj", "attn_qkv", RowsOf(part, query_key_value_rows, change))
    return rules


def query_key_value_rows(config: Any) -> list[int]:
    """Return the rows of q, k and v."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return [heads * head_size_of(config) for heads in (queries, keys, keys)]


def gated_mlp(module: str, suffix: str = "") -> list[Rule]:
    """Return the rules of a layer's dense MLP, or, with a suffix of the tensors, of a shared expert."""
    return [rule for part in ("gate", "up", "down") for rule in renamed(f"{module}.{part}_proj", f"ffn_{part}{suffix}")]


def experts(module: str, *, interleaves: bool = False) -> list[Rule]:
    """Return the rules of a layer's experts: gate and up in a stack each, in one, or a tensor for each expert.

    Args:
        module: of the experts.
        interleaves: whether rows of gate and up take turns in the model.
    """
    gate_up, down = f"{LAYER}.{module}.gate_up_proj", f"{LAYER}.{module}.down_proj"
    blk = "blk.{layer}."
    return [
        Rule(gate_up, (f"{blk}ffn_gate_exps.weight", f"{blk}ffn_up_exps.weight"), interleaves=interleaves),
        Rule(down, (f"{blk}ffn_down_exps.weight",)),
        Rule(f"{gate_up}_bias", (f"{blk}ffn_gate_exps.bias", f"{blk}ffn_up_exps.bias"), interleaves=interleaves),
        Rule(f"{down}_bias", (f"{blk}ffn_down_exps.bias",)),
        # llama.cpp's converter can join gate and up, and before 2024 it wrote a tensor for each expert.
        *([] if interleaves else [Rule(gate_up, (f"{blk}ffn_gate_up_exps.weight",))]),
        Rule(gate_up, (blk + "ffn_gate.{expert}.weight", blk + "ffn_up.{expert}.weight"), interleaves=interleaves),
        Rule(down, (blk + "ffn_down.{expert}.weight",)),
    ]
