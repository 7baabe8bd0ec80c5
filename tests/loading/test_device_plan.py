"""The plan of a GPU's memory: nothing is given out twice, and one budget for every load."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.core import LayerLayout, RecordLayout
from moeflow.errors import BudgetError
from moeflow.loading.device_plan import MemoryNeeds, plan_device, prefill_bytes_per_token, usable_bytes

GIB = 1 << 30


@settings(max_examples=200, deadline=None)
@given(
    free=st.integers(0, 100 * GIB),
    needs=st.builds(
        MemoryNeeds,
        st.integers(0, 4 * GIB),
        st.integers(0, 20 * GIB),
        st.integers(0, 1 << 20),
        st.integers(1, 1 << 17),
    ),
    slot=st.integers(1, 1 << 26),
    slots=st.integers(9, 20_000),
)
def test_parts_of_a_plan_are_at_most_what_is_free(free, needs, slot, slots):
    try:
        plan = plan_device(free, needs, all_bytes=slots * slot, least_bytes=9 * slot, slot_bytes=slot)
    except BudgetError:
        return
    assert plan.expert_bytes + plan.reserved_bytes <= free
    assert 9 * slot <= plan.expert_bytes <= slots * slot
    assert plan.expert_bytes % slot == 0
    outputs = plan.prefill_tokens * needs.bytes_per_prefill_token
    assert needs.activation_bytes + needs.key_value_bytes + outputs <= plan.reserved_bytes
    assert 1 <= plan.prefill_tokens <= needs.context


def test_a_long_prompt_on_a_small_card_is_cut():
    """12 GB, a model shaped like Qwen3-30B: 8 of 128 experts, 2048 wide, 768 between, 128k tokens of context."""
    record = RecordLayout.pack([("gate_up_proj", "BF16", (1536, 2048)), ("down_proj", "BF16", (2048, 768))])
    a_token = prefill_bytes_per_token(8, LayerLayout("layers.0", 128, record))
    assert a_token == 8 * 4 * (2048 + 768)
    needs = MemoryNeeds(GIB // 2, 2 * GIB, a_token, 1 << 17)
    plan = plan_device(9 * GIB, needs, all_bytes=54 * GIB, least_bytes=9 << 23, slot_bytes=9 << 20)
    assert plan.prefill_tokens < needs.context
    assert plan.prefill_tokens % 128 == 0
    assert plan.prefill_tokens * a_token <= GIB
    short = plan_device(9 * GIB, needs._replace(context=512), all_bytes=54 * GIB, least_bytes=9, slot_bytes=9 << 20)
    assert short.prefill_tokens == 512
    assert short.expert_bytes > plan.expert_bytes


def test_a_card_with_less_than_the_least_is_refused_with_what_is_missing():
    needs = MemoryNeeds(GIB, GIB, 0, 4096)
    with pytest.raises(BudgetError, match=r"of 4,096 tokens, keys and values\. The experts need at least 1,000\."):
        plan_device(2 * GIB, needs, all_bytes=10_000, least_bytes=1000, slot_bytes=100)


def test_what_an_earlier_load_left_in_the_allocator_is_free():
    assert usable_bytes(10 * GIB, 0, 0) == usable_bytes(4 * GIB, 6 * GIB, 0) == 10 * GIB
    assert usable_bytes(4 * GIB, 6 * GIB, 5 * GIB) == 5 * GIB
