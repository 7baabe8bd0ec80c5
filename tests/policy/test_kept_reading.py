"""Files are read as far as that takes less time than computing what they hold."""

import pytest

from moeflow.policy.kept_reading import num_worth_reading


@pytest.mark.parametrize(
    ("num_bytes", "places", "read_s", "prefill_s", "expected"),
    [
        ([100, 100], [40, 60], 0.01, 0.1, 2),
        ([100, 1000], [40, 60], 0.01, 0.1, 1),  # the second file takes 10 s for 20 tokens of 2 s
        ([1000, 100], [40, 60], 0.01, 0.1, 0),
        ([100, 100], [0, 60], 0.01, 0.1, 2),  # the first has no window at its end
        ([400], [40], 0.01, 0.1, 0),  # as long as computing
        ([10**9, 10**9], [40, 40], None, 0.1, 1),
        ([10**9], [40], 0.01, None, 1),
        ([1], [0], None, None, 0),
        ([], [], 0.01, 0.1, 0),
    ],
)
def test_those_are_read_that_save_the_most_time(num_bytes, places, read_s, prefill_s, expected):
    assert num_worth_reading(num_bytes, places, 0, read_s=read_s, prefill_s=prefill_s) == expected


def test_what_is_there_already_saves_nothing():
    assert num_worth_reading([100], [40], 40, read_s=None, prefill_s=None) == 0
    assert num_worth_reading([100], [40], 25, read_s=0.01, prefill_s=0.1) == 1
    assert num_worth_reading([100], [40], 35, read_s=0.01, prefill_s=0.1) == 0
