"""What the Triton kernels must do where records lie in several allocations; `triton_claims.py` takes it in."""

import random

import pytest
import torch

from helpers.triton_experts import DEVICE, Experts, decode, group, prefill, routed


@pytest.mark.parametrize(("name", "seed"), [("int4-g64", 0), ("int4-g64", 1), ("bfloat16", 2)])
def test_records_may_lie_in_any_allocations(name, seed):
    """Calls have the same bits, in whatever order the allocations lie around the base."""
    experts, draw = Experts(name, 70, 72), random.Random(seed)
    rows, stride = experts.arena.tolist(), experts.arena.shape[1]
    memory = [torch.full((draw.randint(1, 3), stride), 255, dtype=torch.uint8, device=DEVICE) for _ in range(7)]
    memory.sort(key=torch.Tensor.data_ptr)
    base = memory[3]
    segments = draw.sample([segment for segment in memory if segment is not base], len(rows) - 1)
    segments.insert(draw.randrange(len(rows)), base)
    located = []
    for slot, segment in enumerate(segments):
        segment[-1].copy_(experts.arena[slot])
        offset, rest = divmod(segment[-1].data_ptr() - base.data_ptr(), 64)
        assert rest == 0
        located.append(offset)
    assert min(located) < 0 < max(located)
    located = torch.tensor([*located, -1], dtype=torch.int32, device=DEVICE)
    hidden_states, slots, top_k_weights = routed(experts, 4, 3, torch.bfloat16, seed=seed)
    whole, locations = decode(experts, hidden_states, slots, top_k_weights), located[slots.long()]
    assert torch.equal(experts.kernels.decode(hidden_states, base, locations, top_k_weights), whole)
    missed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    numbers = torch.where(slots < 0, len(rows), slots)
    arguments = hidden_states, base, numbers, located, missed, 0, top_k_weights
    assert torch.equal(experts.kernels.lookup(*arguments), whole)
    assert missed.item() == (slots < 0).any()
    outputs = torch.zeros(slots.numel(), 70, device=DEVICE)
    present, tokens, offsets, places = group(slots)
    experts.kernels.prefill(hidden_states, base, located[present.long()], tokens, offsets, places, outputs)
    combined = experts.kernels.combine(outputs, top_k_weights, torch.bfloat16)
    assert torch.equal(combined, prefill(experts, hidden_states, slots, top_k_weights))
