"""What a budget of host memory buys beside a GPU."""

import pytest

from moeflow.errors import BudgetError
from moeflow.loading.budget import ExpertsSize

SIZE = ExpertsSize(100, 4, 1000, 1000, 100_000)


def host_slots(host_memory, *, free_bytes=50_000, all_on_device=False, size=SIZE):
    return size.host_slots_for(host_memory, free_bytes=free_bytes, reads_in_flight=8, all_on_device=all_on_device)


def test_auto_pins_a_share_of_what_is_free_and_never_less_than_the_reads_in_flight():
    assert host_slots("auto") == 30
    assert host_slots("auto", free_bytes=1000) == 8
    assert host_slots("auto", free_bytes=10**9) == 100
    assert host_slots("auto", size=ExpertsSize(3, 2, 1000, 1000, 3000)) == 3


def test_a_ring_is_enough_where_every_expert_has_a_slot_on_the_device():
    assert host_slots("auto", all_on_device=True) == 8
    assert host_slots("50%", all_on_device=True) == 50  # who gives a size gets it


def test_a_size_below_the_reads_in_flight_is_refused():
    assert host_slots(8000) == 8
    with pytest.raises(BudgetError, match="minimum of 8,000"):
        host_slots(7999)
