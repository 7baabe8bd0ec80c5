"""Whether keys and values of a sequence that gives way are moved or computed again, by measured speeds."""

import pytest

from moeflow.engine.kv_cache.preemption import MeasuredSpeeds


@pytest.mark.parametrize(("copy_s", "moved"), [(4e-7, True), (6e-7, False)])
def test_keys_and_values_move_where_two_copies_take_less_time_than_computing_them(copy_s, moved):
    speeds = MeasuredSpeeds()
    speeds.saw_prefill(100, 0.1)  # 1 ms a token
    speeds.saw_copy(10_000, 10_000 * copy_s)
    assert speeds.favour_copy(50, 50 * 1000, 1 << 20) == moved  # 1,000 bytes a token: 0.8 or 1.2 ms for both copies


def test_a_copy_that_was_never_measured_is_tried_and_then_judged():
    speeds = MeasuredSpeeds()
    assert speeds.favour_copy(10, 1000, 1000)
    speeds.saw_copy(1000, 1.0)
    assert not speeds.favour_copy(10, 1000, 1000), "what computing takes is not known"
    speeds.saw_prefill(1, 1000.0)
    assert speeds.favour_copy(10, 1000, 1000)


def test_nothing_moves_where_host_memory_is_short_or_nothing_is_computed():
    assert not MeasuredSpeeds().favour_copy(10, 1000, 999)
    assert not MeasuredSpeeds().favour_copy(0, 0, 1000)


def test_a_measurement_counts_for_a_quarter_beside_those_before():
    speeds = MeasuredSpeeds()
    for seconds in (1.0, 5.0):
        speeds.saw_prefill(1, seconds)
        speeds.saw_copy(2, seconds)
    assert (speeds.prefill_s, speeds.copy_s) == (2.0, 1.0)
