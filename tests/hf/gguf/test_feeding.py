"""What feeds a parameter: the first rule whose tensors are there, and nothing of the file is left over in silence."""

import pytest

from moeflow.errors import CheckpointError
from moeflow.hf.gguf.architecture import Architecture, Rule
from moeflow.hf.gguf.feeding import feed

GATE_UP = "layers.{layer}.experts.gate_up_proj"
RULES = [
    Rule(GATE_UP, ("blk.{layer}.gate_exps", "blk.{layer}.up_exps")),
    Rule(GATE_UP, ("blk.{layer}.gate_up_exps",)),
    Rule(GATE_UP, ("blk.{layer}.gate.{expert}", "blk.{layer}.up.{expert}")),
    Rule("embed", ("token_embd",)),
]
KNOWN = Architecture("one", "one_moe", lambda metadata, tensors: {}, None, lambda config: RULES)
NAMES = ["embed", "layers.0.experts.gate_up_proj", "layers.11.experts.gate_up_proj"]


def test_the_first_rule_whose_tensors_are_there_counts_in_each_layer():
    held = ["token_embd", "blk.0.gate_exps", "blk.0.up_exps", "blk.11.gate_up_exps"]
    found = feed(KNOWN, None, NAMES, held)
    assert {name: fed.tensors for name, fed in found.items()} == {
        "embed": ("token_embd",),
        "layers.0.experts.gate_up_proj": ("blk.0.gate_exps", "blk.0.up_exps"),
        "layers.11.experts.gate_up_proj": ("blk.11.gate_up_exps",),
    }


def test_each_expert_may_have_tensors_of_its_own():
    held = [f"blk.0.{part}.{expert}" for part in ("gate", "up") for expert in range(3)]
    (fed,) = feed(KNOWN, None, ["layers.0.experts.gate_up_proj"], held).values()
    assert fed.is_per_expert
    assert fed.of_expert(2) == ["blk.0.gate.2", "blk.0.up.2"]


@pytest.mark.parametrize("more", ["blk.0.attn_sinks.weight", "blk.12.gate_up_exps", "blk.0.gate_up_exps"])
def test_a_tensor_that_feeds_nothing_is_refused_by_its_name(more):
    held = ["token_embd", "blk.0.gate_exps", "blk.0.up_exps", more]
    with pytest.raises(CheckpointError, match=f"the tensor {more}, .* one_moe model"):
        feed(KNOWN, None, NAMES, held)


def test_factors_of_positions_and_blocks_that_predict_further_tokens_feed_nothing():
    held = ["token_embd", "rope_freqs.weight", "blk.12.nextn.eh_proj.weight", "blk.12.attn_q.weight"]
    assert list(feed(KNOWN, None, NAMES, held)) == ["embed"]
