"""A cache is put back to before a pass, and the pass run again gives what it gave."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.varlen_attention import Segment, VarlenCache
from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.forward import packed_forward
from moeflow.hf.passes.restore_point import restore_point

CONFIG = MixtralConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
)  # fmt: skip


@pytest.mark.parametrize("growing", [False, True])
@torch.no_grad()
def test_a_pass_that_is_run_again_gives_the_same_and_leaves_the_same(growing):
    torch.manual_seed(0)
    model = MixtralForCausalLM(CONFIG).eval()
    cache = DynamicCache(config=CONFIG)
    if growing:
        cache = GrowingCache.in_place_of(cache)
        assert cache is not None
    model(torch.arange(6)[None], past_key_values=cache)
    for token in range(5):
        restore = restore_point(cache)
        assert restore is not None
        first = model(torch.tensor([[token]]), past_key_values=cache).logits
        restore()
        length = cache.get_seq_length()
        assert length == 6 + token
        again = model(torch.tensor([[token]]), past_key_values=cache).logits
        assert torch.equal(first, again)
        assert cache.get_seq_length() == length + 1


@torch.no_grad()
def test_a_pass_of_the_engine_may_run_again_as_it_is():
    torch.manual_seed(0)
    model = MixtralForCausalLM(CONFIG).eval()
    cache = VarlenCache()
    cache.learn(model)
    slots = {name: KeyValueSlot.empty(cache.shapes, 8) for name in "ab"}
    for start in range(6):
        segments = [Segment(slots["a"], start, 1, start + 1), Segment(slots["b"], start, 1, start + 1)]
        arguments = torch.tensor([[start, 9 - start]]), torch.full((1, 2), start), cache, torch.tensor([0, 1])
        logits = []
        with cache.running(model, segments):
            for _ in range(2):
                restore = restore_point(cache)
                assert restore is not None
                logits.append(packed_forward(model, *arguments))
                restore()
        assert torch.equal(*logits)


def test_a_cache_that_is_written_in_place_has_no_restore_point():
    assert restore_point(StaticCache(config=CONFIG, max_cache_len=8)) is None
    assert restore_point(DynamicCache()) is None  # no layer yet
    assert restore_point(None) is None
