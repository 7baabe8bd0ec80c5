"""Sizes, durations and shares as people read them."""

import pytest

from moeflow.formatting import format_bytes, format_percent, format_seconds

MIB, GIB = 1024**2, 1024**3


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (318 * MIB, "318 MiB"),
        (1024 * MIB - 1, "1 GiB"),
        (int(1.24 * GIB), "1.2 GiB"),
        (int(99.97 * MIB), "100 MiB"),
        (3000 * 1024 * GIB, "3000 TiB"),
        (None, "–"),
    ],
)
def test_bytes_are_written_in_the_largest_unit_that_fits(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 ms"),
        (0.0042, "4.2 ms"),
        (0.00999, "10 ms"),
        (0.041, "41 ms"),
        (0.0999, "0.10 s"),
        (0.41, "0.41 s"),
        (9.999, "10.0 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (None, "–"),
    ],
)
def test_seconds_never_round_into_the_next_unit(seconds, text):
    assert format_seconds(seconds) == text


def test_percent_of_nothing_is_a_dash():
    assert format_percent(0.714) == "71 %"
    assert format_percent(None) == "–"
