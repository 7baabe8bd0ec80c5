"""Trusted and asking steps: what of them is timed. Their bits are told by `moe/test_trusted_pass.py`."""

import itertools
import time

from moeflow.offload.stats import Stats
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.trust import Trust


class Noted(Trust):
    """Notes what it is told of asking steps."""

    def __init__(self):
        super().__init__()
        self.told = []

    def asked(self, missed, seconds):
        self.told.append((missed, seconds))


def test_an_asking_step_is_timed_from_where_it_last_began(monkeypatch):
    clock = itertools.count(0.0, 5.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    trusting = Trusting(None, Stats())
    trusting.trust = Noted()

    def captured_first():
        for _ in range(10):
            time.perf_counter()
        trusting.begin_asking()

    trusting.run_asking(captured_first)
    trusting.run_asking(lambda: None)
    assert trusting.trust.told == [(False, 5.0), (False, 5.0)]
