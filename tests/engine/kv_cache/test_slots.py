"""Slots of keys and values: views, growth, copies of beginnings, and parts whose memory is their own."""

import pytest
import torch

from helpers.small_slots import CPU, LAYOUT, POSITION
from moeflow.engine.kv_cache.kv_format import FORMATS
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.slot_rows import SlotRows
from moeflow.engine.kv_cache.slots import KeyValueSlot


def written_slot(num_positions, num_written):
    """A slot with random numbers in its first positions, and these."""
    slot, written = KeyValueSlot.empty(LAYOUT, num_positions), {layer: [] for layer in LAYOUT}
    for layer, shape in LAYOUT.items():
        for place in range(num_written):
            new = [torch.randn(1, heads, 1, features).to(shape.dtype) for heads, features in (shape.key, shape.value)]
            slot.write(layer, place, *new)
            written[layer].append(new)
    whole = {layer: [torch.cat(parts, 2) for parts in zip(*rows, strict=True)] for layer, rows in written.items()}
    return slot, whole


def is_same(slot, whole, begin=0, end=None):
    return all(
        torch.equal(found, wanted[:, :, begin:end])
        for layer, both in whole.items()
        for found, wanted in zip(slot.read(layer, both[0][:, :, begin:end].shape[2]), both, strict=True)
    )


def test_what_was_written_is_read_without_a_copy():
    slot, whole = written_slot(5, 5)
    assert slot.nbytes == 5 * POSITION
    assert is_same(slot, whole)
    assert slot.read(1, 3)[0].data_ptr() == slot.keys[1].data_ptr()
    with pytest.raises(AssertionError, match="position 5 of a slot of 5"):
        slot.write(0, 5, *(tensor[:, :, :1] for tensor in whole[0]))


def test_a_copied_beginning_is_the_receivers_own():
    donor, whole = written_slot(4, 4)
    receiver = KeyValueSlot.empty(LAYOUT, 6)
    receiver.copy_from(donor, 2)
    receiver.copy_from(donor, 4, 2)
    for tensor in (*donor.keys.values(), *donor.values.values()):
        tensor.zero_()
    assert is_same(receiver, whole, 0, 2)
    assert is_same(receiver.part(2, 6), whole)


def test_a_slot_that_grows_keeps_what_was_written_and_tells_its_new_addresses():
    slot, whole = written_slot(4, 3)
    before = SlotRows([slot], [3]).table(dict.fromkeys(LAYOUT)).copy()
    slot.grow(9, 3)
    assert (slot.num_positions, slot.nbytes) == (9, 9 * POSITION)
    assert is_same(slot, whole)
    after = SlotRows([slot], [3]).table(dict.fromkeys(LAYOUT))
    assert after[:, 0].tolist() == [[slot.keys[n].data_ptr(), slot.values[n].data_ptr(), 9] for n in LAYOUT]
    assert (before[:, 0, 2] == 4).all()


def test_a_slot_that_cannot_grow_has_what_it_had_and_may_try_again(monkeypatch):
    slot, whole = written_slot(4, 4)
    slot.addresses((0, 1))
    new_empty = torch.Tensor.new_empty

    def without_memory(tensor, *shape):
        if tensor.dtype == torch.bfloat16:
            raise RuntimeError("no memory")
        return new_empty(tensor, *shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", without_memory)
    with pytest.raises(RuntimeError, match="no memory"):
        slot.grow(8, 4)
    assert slot.num_positions == 4
    assert is_same(slot, whole)
    assert slot.addresses((0, 1)).tolist() == [
        [slot.keys[n].data_ptr(), slot.values[n].data_ptr(), room] for n, room in ((0, 8), (1, 4))
    ], "a kernel strides by the room that each layer has"
    monkeypatch.undo()
    slot.grow(8, 4)
    assert slot.nbytes == 8 * POSITION
    assert is_same(slot, whole)


@pytest.mark.parametrize(("begin", "end", "copied"), [(0, 6, False), (0, 5, True), (2, 6, True)])
def test_a_slot_gives_up_positions_with_memory_of_their_own_and_copies_no_whole(begin, end, copied):
    slot, whole = written_slot(6, 6)
    before = {tensor.data_ptr() for tensor in slot.keys.values()}
    given = slot.give_up(begin, end)
    assert is_same(given, whole, begin, end)
    assert (slot.nbytes, given.nbytes, given.num_positions) == (0, (end - begin) * POSITION, end - begin)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in given.keys.values())
    assert ({tensor.data_ptr() for tensor in given.keys.values()} == before) != copied


def test_records_are_copied_as_they_are_and_read_as_the_numbers_that_they_stand_for():
    form, given = FORMATS["int4"], [torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 48)]
    layout = {0: LayerShape((2, 16), (2, 48), torch.float32, CPU, form=form)}
    slot = KeyValueSlot.empty(layout, 6)
    slot.write(0, 0, *given)
    sides = zip((form.key, form.value), given, strict=True)
    expected = [side.decode(side.encode(one), one.shape[3], torch.float32) for side, one in sides]
    moved = KeyValueSlot.empty(layout, 4)
    moved.copy_from(slot.part(1, 5), 4)
    moved.grow(9, 4)
    assert slot.nbytes == 6 * layout[0].position_bytes == 6 * 2 * (18 + 28)
    assert moved.keys[0].dtype == torch.uint8
    for found, moved_one, whole in zip(slot.read(0, 6), moved.read(0, 4), expected, strict=True):
        assert torch.equal(found, whole)
        assert torch.equal(moved_one, whole[:, :, 1:5])
