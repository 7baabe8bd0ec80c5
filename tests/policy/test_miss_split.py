"""The split of misses between link and CPU: never worse than either alone, follows drifting bandwidths, probes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeflow.policy.miss_split import MissSplit

EXPERT = 13_200_000
SPEEDS = st.floats(1e9, 1e11)


def measured(copy_per_s, host_per_s, copy_beside_per_s=None, host_beside_per_s=None, times=1):
    """A split that has seen both ways at these bandwidths."""
    split = MissSplit()
    learn(split, copy_per_s, host_per_s, copy_beside_per_s, host_beside_per_s, times)
    return split


def learn(split, copy_per_s, host_per_s, copy_beside_per_s=None, host_beside_per_s=None, times=1):
    for _ in range(times):
        split.copied(EXPERT, EXPERT / copy_per_s, beside=False)
        split.copied(EXPERT, EXPERT / (copy_beside_per_s or copy_per_s), beside=True)
        split.computed(EXPERT, 1, EXPERT / host_per_s, beside=False)
        split.computed(EXPERT, 1, EXPERT / (host_beside_per_s or host_per_s), beside=True)


@given(SPEEDS, SPEEDS, SPEEDS, SPEEDS, st.lists(st.integers(1, 64), min_size=1, max_size=16), st.integers(0, 3))
def test_no_other_number_of_experts_ends_sooner(copy, host, copy_beside, host_beside, num_tokens, num_ahead):
    split, num_tokens = measured(copy, host, copy_beside, host_beside), sorted(num_tokens)
    for tokens in (2, 4):  # else one of them may be a probe
        for beside in (False, True):
            split.computed(EXPERT, tokens, EXPERT / 1e10, beside=beside)
    chosen = split.split(num_tokens, EXPERT, num_ahead)
    ends = [split.finish_s(num_tokens, EXPERT, num_ahead, on_host) for on_host in range(len(num_tokens) + 1)]
    assert ends[chosen] == min(ends)
    assert ends.index(min(ends)) == chosen  # among equals the one that copies most


@given(SPEEDS, SPEEDS, st.integers(1, 32))
def test_equal_experts_are_split_by_the_bandwidths_of_both_running(copy, host, m):
    copied = m - measured(copy, host).split([1] * m, EXPERT)
    assert abs(copied - m * copy / (copy + host)) < 1


def test_finishing_time_of_a_known_case():
    split = measured(25e9, 50e9, copy_beside_per_s=20e9, host_beside_per_s=40e9)
    copy_s, host_s = EXPERT / 20e9, EXPERT / 40e9
    assert split.finish_s([1] * 6, EXPERT, 0, 4) == pytest.approx(max(2 * copy_s, 4 * host_s))
    assert split.finish_s([1] * 6, EXPERT, 0, 0) == pytest.approx(6 * EXPERT / 25e9)
    assert split.finish_s([1] * 6, EXPERT, 0, 6) == pytest.approx(6 * EXPERT / 50e9)
    assert split.finish_s([1] * 6, EXPERT, 1, 6) == pytest.approx(6 * host_s)  # a copy runs beside
    assert split.split([1] * 6, EXPERT) == 4


def test_copies_under_way_send_more_to_the_cpu():
    split = measured(25e9, 25e9)
    assert split.split([1] * 4, EXPERT, 0) == 2
    assert split.split([1] * 4, EXPERT, 2) == 3


def test_an_expert_of_many_tokens_is_copied_until_the_cpu_was_seen_to_be_fast():
    split = measured(25e9, 50e9)
    assert split.split([1], EXPERT) == 1
    assert split.split([64], EXPERT) == 0
    split.computed(EXPERT, 64, EXPERT / 40e9, beside=False)
    assert split.split([64], EXPERT) == 1


def test_the_first_experts_go_both_ways():
    split = MissSplit()
    assert split.split([1], EXPERT) == 1  # copies measure themselves from the first one on, the CPU has to be asked
    split.computed(EXPERT, 1, 1e-4, beside=False)
    assert split.split([1], EXPERT) == 0
    split.copied(EXPERT, 1e-3, beside=False)
    assert split.split([1], EXPERT) == 1


def test_many_tokens_are_never_a_probe():
    split = MissSplit()
    assert [split.split([500] * 3, EXPERT) for _ in range(500)] == [0] * 500


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(("copy", "host"), [(1e9, 90e9), (90e9, 1e9)])
def test_the_slow_way_is_probed_now_and_then_by_one_expert(m, copy, host):
    split = measured(copy, host)
    chosen = [split.split([1] * m, EXPERT) for _ in range(1000)]
    usual = m if host > copy else 0
    probes = [number for number in chosen if number != usual]
    assert set(probes) == {abs(usual - (1 if usual else -1))}
    assert 5 <= len(probes) <= 20


@pytest.mark.parametrize("m", [1, 2, 4])
def test_decisions_follow_drifting_bandwidths(m):
    """A machine that is simulated: what was decided is measured, nothing else is."""
    split, chosen = MissSplit(), []
    for host in (5e9, 80e9, 5e9):
        for _ in range(1200):
            on_host = split.split([1] * m, EXPERT)
            copies = m - on_host
            for _ in range(on_host):
                split.computed(EXPERT, 1, EXPERT / host, beside=copies > 0)
            for _ in range(copies):
                split.copied(EXPERT, EXPERT / 25e9, beside=on_host > 0)
        chosen.append(split.finish_s([1] * m, EXPERT, 0, on_host))
        best = min(max((m - j) * EXPERT / 25e9, j * EXPERT / host) for j in range(m + 1))
        assert chosen[-1] == pytest.approx(best, rel=0.05)


def test_nothing_missed_is_no_decision():
    assert MissSplit().split([], EXPERT) == 0


def test_bandwidths_are_reported():
    assert set(MissSplit().as_dict().values()) == {None}
    figures = measured(25e9, 50e9, 20e9, 40e9, times=3).as_dict()
    assert figures["copy_bytes_per_s"] == pytest.approx(25e9)
    assert figures["copy_beside_compute_bytes_per_s"] == pytest.approx(20e9)
    assert figures["host_bytes_per_s"] == pytest.approx(50e9)
    assert figures["host_beside_copies_bytes_per_s"] == pytest.approx(40e9)
