"""Slots of keys and values: exact bytes, views, and copies of beginnings."""

import pytest
import torch

from moeflow.engine.kv_cache import KeyValueSlots, LayerShape
from moeflow.errors import BudgetError

CPU = torch.device("cpu")
LAYOUT = {
    0: LayerShape((2, 8), (2, 8), torch.float32, CPU),
    1: LayerShape((1, 16), (1, 4), torch.bfloat16, CPU),  # as latent attention has it
}
POSITION = (2 * 8 + 2 * 8) * 4 + (16 + 4) * 2


def random_position(shape):
    return [torch.randn(1, heads, 1, features).to(shape.dtype) for heads, features in (shape.key, shape.value)]


def test_bytes_are_those_of_the_tensors_and_return_to_zero():
    slots = KeyValueSlots(LAYOUT, 10 * POSITION)
    assert slots.position_bytes == POSITION
    assert slots.allocate("a", 7)
    assert not slots.allocate("b", 4)
    assert slots.allocate("b", 3)
    assert slots.used_bytes == slots.budget_bytes
    slots.check_integrity()
    slots.free("a")
    slots.free("b")
    slots.check_integrity()
    assert (slots.used_bytes, len(slots)) == (0, 0)
    assert slots.allocate("c", 1)
    assert slots.peak_bytes == 10 * POSITION


def test_a_sequence_beyond_the_whole_budget_is_refused_with_both_numbers():
    slots = KeyValueSlots(LAYOUT, 10 * POSITION)
    slots.check_possible(10)
    with pytest.raises(BudgetError, match=rf"{11 * POSITION:,} bytes.*{10 * POSITION:,} bytes"):
        slots.check_possible(11)


def test_what_was_written_is_read_without_a_copy():
    slots = KeyValueSlots(LAYOUT, 10 * POSITION)
    slots.allocate("a", 5)
    written = [random_position(LAYOUT[1]) for _ in range(5)]
    for place, (keys, values) in enumerate(written):
        slots["a"].write(1, place, keys, values)
    keys, values = slots["a"].read(1, 3)
    assert torch.equal(keys, torch.cat([keys for keys, _ in written[:3]], 2))
    assert torch.equal(values, torch.cat([values for _, values in written[:3]], 2))
    assert keys.data_ptr() == slots["a"].keys[1].data_ptr()


def test_a_copied_beginning_is_the_receivers_own():
    slots = KeyValueSlots(LAYOUT, 20 * POSITION)
    for id in ("donor", "receiver"):
        slots.allocate(id, 4)
    for layer, shape in LAYOUT.items():
        for place in range(4):
            slots["donor"].write(layer, place, *random_position(shape))
    slots["receiver"].copy_from(slots["donor"], 2)
    for layer, shape in LAYOUT.items():
        before = [part.clone() for part in slots["donor"].read(layer, 2)]
        assert all(map(torch.equal, slots["receiver"].read(layer, 2), before))
        slots["donor"].write(layer, 0, *random_position(shape))
        assert all(map(torch.equal, slots["receiver"].read(layer, 2), before))
