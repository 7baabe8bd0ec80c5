"""Counters are numbers: the difference of two snapshots loses none of them, and leaves both as they were."""

from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from moeflow import load_moe
from moeflow.offload.stats import Decisions, PhaseStats, PredictionStats, ReadStats, RuntimeStats
from moeflow.policy.prefetch_ledger import PrefetchCounts, PrefetchLedger

# What counts nothing, by its name in `stats()`: it is as it is now. Every other number must be a difference.
NOW = {"slots", "num_experts", "threads", "memory", "plan", "miss", "on", "losing", "distance", "step"}
RATES = {"hit_rate", "precision", "timeliness", "recall_of_misses"}


def counted(kind, value):
    """An instance whose every counter is `value`."""
    given = {}
    for one in fields(kind):
        if "now" in one.metadata or one.name in ("losing", "expert_bytes"):
            given[one.name] = 7
        elif is_dataclass(one.type):
            given[one.name] = counted(one.type, value)
        elif one.name == "prediction":
            given[one.name] = counted(PredictionStats, value)
        else:
            given[one.name] = np.full((2, 3), value) if one.type is np.ndarray else value
    return kind(**given)


def numbers(found, path=()):
    """Yield (path, number) of every number in nested dicts and lists."""
    if isinstance(found, dict | list):
        for name, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from numbers(value, (*path, name))
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, found


@pytest.mark.parametrize("kind", [Decisions, PhaseStats, PredictionStats, ReadStats, RuntimeStats, PrefetchCounts])
def test_every_counter_is_a_difference(kind):
    after, before = counted(kind, 5), counted(kind, 2)
    np.testing.assert_equal(asdict(after - before), asdict(counted(kind, 3)))
    np.testing.assert_equal((asdict(after), asdict(before)), (asdict(counted(kind, 5)), asdict(counted(kind, 2))))


def test_a_snapshot_stays_as_it_was():
    phase = PhaseStats(hits=1)
    before = phase.copy()
    phase.hits += 1
    phase.decisions.read += 1
    assert (before.hits, before.decisions.read) == (1, 0)
    ledger = PrefetchLedger(1)
    before = ledger.counts()
    ledger.issued[0, 0] += 1
    assert before.issued.sum() == 0


def test_each_answer_has_its_own_share_of_every_counter(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="25%", predictor="markov")
    snapshots = [model.moeflow.snapshot()]
    with model.moeflow:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        for first in (5, 9):
            model.generate(torch.tensor([[first, 7, 8]]), **options)
            snapshots.append(model.moeflow.snapshot())
        assert model.moeflow.stats().keys() == snapshots[-1].as_dict().keys()
    begin, middle, end = (dict(numbers(one.as_dict())) for one in snapshots)
    first, second = (dict(numbers((after - before).as_dict())) for before, after in pairwise(snapshots))
    for path, number in end.items():
        if not NOW.intersection(path) and path[-1] not in RATES:
            assert first[path] == pytest.approx(middle[path] - begin[path]), path
            assert second[path] == pytest.approx(number - middle[path]), path
    assert second.keys() >= {("decode", "predict_s"), ("decode", "waited_for_prefetch"), ("io", "read_s")}
    assert second["decode", "tokens"] == 11
    assert second["prediction", "steps_on"] + second["prediction", "steps_off"] == 11
