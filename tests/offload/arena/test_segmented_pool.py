"""Slots in segments: where they lie, what gives memory back, and what a device without memory leaves as it was."""

import weakref

import pytest
import torch

from moeflow.core import PAGE_BYTES, RecordLayout
from moeflow.errors import BudgetError
from moeflow.offload.arena import segmented_pool
from moeflow.offload.arena.segmented_pool import SegmentedPool

CPU = torch.device("cpu")  # stands in for a device: the pool asks torch alone
RECORD = RecordLayout.pack([("w", "F32", (1000,))])


def pool_of(num_slots=11, num_open=7, in_segment=3):
    return SegmentedPool(num_slots, RECORD.num_bytes, CPU, num_open=num_open, segment_bytes=in_segment * PAGE_BYTES)


def memory_of(pool, segment):
    return weakref.ref(pool._segments[segment])


def test_a_budget_has_as_many_slots_as_it_buys_and_segments_hold_whole_ones():
    pool = pool_of()
    assert [list(pool.slots_of(segment)) for segment in pool.segments(is_open=True)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(pool.slots_of(segment)) for segment in pool.segments(is_open=False)] == [[7, 8, 9], [10]]
    assert (pool.num_open, pool.closed_slots()) == (7, [7, 8, 9, 10])
    assert pool_of(4, None, 0).segments(is_open=True) == [0, 1, 2, 3]  # a record may be larger than a segment


def test_locations_lead_from_the_base_to_every_slot():
    pool = pool_of()
    assert all(pool.take(segment) for segment in pool.segments(is_open=False))
    assert pool.location(0) != 0 or pool.location(3) != 0
    for slot in range(11):
        record = pool.record(slot, RECORD.num_bytes)
        record.fill_(slot)
        assert record.data_ptr() == pool.address_of(slot) == pool.base.data_ptr() + 64 * pool.location(slot)
    assert all(bool((pool.views(slot, RECORD)["w"].view(torch.uint8) == slot).all()) for slot in range(11))


def test_memory_that_is_given_back_is_free_though_views_of_it_were_handed_out():
    pool = pool_of()
    assert len(pool.segments_to_spare()) == 2
    found = [memory_of(pool, segment) for segment in pool.segments_to_spare()]
    for slot in range(7):
        pool.views(slot, RECORD)
    pool.give_back(pool.segments_to_spare())
    assert [memory() for memory in found] == [None, None]
    assert pool.segments_to_spare() == []
    assert pool.base.data_ptr() == pool.address
    with pytest.raises(AssertionError, match="has no memory"):
        pool.record(pool.closed_slots()[0], 1)


def test_a_segment_that_the_device_has_no_memory_for_stays_closed(monkeypatch):
    empty = torch.empty

    def refuse(*shape, **options):
        if "device" in options:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    pool = pool_of()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", refuse)
        assert not pool.take(3)
    assert pool.num_open == 7
    assert pool.take(3)
    assert pool.num_open == 10
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(BudgetError, match="could not be allocated on cpu"):
        pool_of()


def test_memory_that_kernels_cannot_reach_is_refused(monkeypatch):
    pool = pool_of()
    monkeypatch.setattr(segmented_pool, "_MOST", 0)
    assert not pool.take(3)
    assert pool.num_open == 7
    with pytest.raises(BudgetError, match="kernels reach 0 bytes around one address"):
        pool_of()


def test_a_closed_pool_holds_nothing():
    pool = pool_of()
    found = [memory_of(pool, segment) for segment in range(3)]
    pool.close()
    assert [memory() for memory in found] == [None] * 3
    pool.close()
