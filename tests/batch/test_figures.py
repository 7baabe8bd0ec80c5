"""How much of a batch is done: guesses that use what has been seen and are right at both ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeflow.batch.figures import BatchShare


def test_requests_are_expected_to_take_their_maximum_until_one_has_ended():
    share = BatchShare({"a": 10, "b": 30})
    assert share.done == 0
    share.add({"a": 1}, [])
    share.add({"a": 1, "b": 2}, [])
    assert share.done == 4 / 40


def test_later_requests_are_expected_to_take_the_mean_length_and_never_more_than_they_may():
    share = BatchShare({"a": 100, "b": 100, "c": 100, "d": 3})
    share.add({"a": 20, "b": 10}, ["a"])
    mean = 30 / 1
    assert share.done == pytest.approx(30 / (30 + mean + mean + 3))
    share.add({"b": 80}, [])
    assert share.done == pytest.approx(110 / (110 + 10 + 100 + 3)), "b may get 10 more, c as many as the mean or 100"


def test_failed_requests_are_done_and_make_no_answer_shorter():
    share = BatchShare(dict.fromkeys("abc", 10))
    share.add({}, ["a"])
    share.add({"b": 0}, ["b"])
    assert share.done == 0
    share.add({"c": 5}, [])
    assert share.done == 0.5
    share.add({"c": 1}, ["c"])
    assert (share.done, share.num_ended, share.num_tokens) == (1, 3, 6)


@given(st.data())
def test_the_share_stays_between_0_and_1_and_ends_at_1(data):
    lengths = data.draw(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 9), min_size=1))
    share = BatchShare({name: max(length, 1) + data.draw(st.integers(0, 3)) for name, length in lengths.items()})
    left = dict(lengths)
    while left:
        assert 0 <= share.done < 1
        name = data.draw(st.sampled_from(sorted(left)))
        left[name] -= 1
        share.add({name: 1} if left[name] >= 0 else {}, [name] if left[name] <= 0 else [])
        if left[name] <= 0:
            del left[name]
    assert share.done == 1
    assert share.num_tokens == sum(lengths.values())
