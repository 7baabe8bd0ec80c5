"""Captured steps: replayed while calls and memory stay as they were, captured anew or left out where not.

CUDA graphs are stood in for by recorded operations on CPU tensors. That whole models keep their bits is told by
`moe/test_trusted_pass.py`.
"""

import gc

import numpy as np
import pytest
import torch

from helpers.recorded_capture import RecordedCapture
from moeflow.offload.trusting.captured_steps import _MOST
from moeflow.offload.trusting.step_graphs import StepGraphs
from moeflow.offload.trusting.trusted_step import TrustedStep


class Table:
    """Of two layers, whose experts from 3 on are absent."""

    def __init__(self):
        self.arena, self.missed = torch.zeros(4, 8), torch.zeros(2, dtype=torch.int32)


class Memory:
    """Of a generation: a sum so far, kept at a position."""

    def __init__(self, capacity=4):
        self.capacity, self.position, self.sums = capacity, torch.zeros(1, dtype=torch.int64), torch.zeros(capacity)

    @property
    def memory(self):
        return [self.position, self.sums]


class Steps:
    """Runs steps of a small model: the sum of a memory, with the new number in it, doubled by two layers."""

    def __init__(self):
        self.capture, self.table, self.num_runs, self.step = RecordedCapture(), Table(), 0, None
        self.warmed_by = []
        self.graphs = StepGraphs(self.capture, self.table)

    def begin(self, captured=None):
        self.step = captured or TrustedStep(self.table)
        return self.step

    def forward(self, number, cache, factor=1, attention_mask=None):
        self.num_runs += 1
        if self.num_runs == 1:
            self.warmed_by = number.tolist()
        for layer in range(2):
            experts = (number.long() + layer).view(1, 1)
            self.step.add(layer, experts)
            self.table.missed[layer : layer + 1].logical_or_(experts.view(1) >= 3)
        cache.sums.index_copy_(0, cache.position, number)
        seen = cache.sums if attention_mask is None else cache.sums * attention_mask[0]
        return {"total": seen.sum().view(1) * factor, "cache": cache}

    def run(self, cache, position, *args, **kwargs):
        """Run a step; return its total, the experts of its layers, and whether one was missed."""
        cache.position.fill_(position)
        made = self.graphs.run(self.begin, cache, self.forward, args, {**kwargs, "cache": cache})
        assert made["cache"] is cache
        routes = self.step.finish()
        assert routes.layers == [0, 1]
        return float(made["total"]), np.concatenate(routes.experts).ravel().tolist(), routes.missed


@pytest.fixture
def steps():
    return Steps()


def number(value):
    return torch.tensor([float(value)])


def test_a_step_is_captured_once_and_then_replayed_with_its_own_numbers(steps):
    cache = Memory()
    assert steps.run(cache, 0, number=number(1)) == (1, [1, 2], False)
    assert steps.run(cache, 1, number=number(0)) == (1, [0, 1], False)
    assert steps.run(cache, 2, number=number(2)) == (3, [2, 3], True)
    assert steps.run(cache, 2, number=number(1)) == (2, [1, 2], False)
    assert steps.warmed_by == [1]
    assert (steps.num_runs, steps.capture.num_captured, steps.capture.num_replayed) == (2, 1, 4)
    assert steps.graphs.as_dict() == {"captured": 1, "replayed": 4, "not_replayed": None}


def test_what_a_replay_returned_is_not_changed_by_the_next(steps):
    cache = Memory()

    def total(value):
        given = {"number": number(value), "cache": cache}
        return steps.graphs.run(steps.begin, cache, steps.forward, (), given)["total"]

    first = total(1)
    total(2)
    assert float(first) == 1


def test_a_mask_grows_without_a_new_capture(steps):
    cache = Memory()
    cache.sums[:] = 1.0
    for length in (1, 2, 3):
        seen = torch.ones(1, length)
        assert steps.run(cache, 0, number=number(1), attention_mask=seen)[0] == length
    assert steps.capture.num_captured == 1


@pytest.mark.parametrize(
    "other",
    [
        {"number": torch.ones(1, dtype=torch.float64).float().expand(1), "factor": 2},
        {"number": number(1), "attention_mask": torch.ones(1, 4)},
    ],
    ids=("a number", "a mask"),
)
def test_another_call_is_captured_apart(steps, other):
    cache = Memory()
    first = steps.run(cache, 0, number=number(1))
    steps.run(cache, 0, **other)
    assert steps.capture.num_captured == 2
    assert steps.run(cache, 0, number=number(1)) == first
    assert steps.capture.num_captured == 2


def test_memory_that_was_moved_is_captured_anew(steps):
    cache = Memory()
    steps.run(cache, 0, number=number(1))
    cache.sums, cache.capacity = torch.cat((cache.sums, torch.zeros(4))), 8
    assert steps.run(cache, 1, number=number(2))[0] == 3
    assert steps.capture.num_captured == 2
    steps.table.arena = torch.zeros(4, 8)
    assert steps.run(cache, 2, number=number(1))[0] == 4
    assert steps.capture.num_captured == 3


def test_a_generation_that_changes_too_often_runs_as_it_is(steps):
    cache = Memory()
    for factor in range(1, _MOST + 2):
        assert steps.run(cache, 0, number=number(1), factor=factor)[0] == factor
    assert steps.capture.num_captured == _MOST
    assert f"more than {_MOST} times" in steps.graphs.reason
    assert steps.run(cache, 0, number=number(2), factor=3)[0] == 6
    assert steps.graphs.reason is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda steps: steps.run(Memory(), 0, number(1)), "without names"),
        (lambda steps: steps.run(Memory(), 0, number=number(1), attention_mask=[torch.ones(4)]), "of type list"),
    ],
)
def test_a_call_that_cannot_be_captured_runs_as_it_is(steps, change, reason):
    assert change(steps) == (1, [1, 2], False)
    assert reason in steps.graphs.reason
    assert steps.capture.num_captured == 0


def test_a_step_that_waits_for_the_device_is_tried_once(steps):
    own = steps.forward

    def waits(number, cache):
        made = own(number, cache)
        return {**made, "total": made["total"] * (2 if bool(number > 1) else 1)}

    steps.forward = waits
    cache = Memory()
    assert [steps.run(cache, 0, number=number(value))[0] for value in (1, 2, 1)] == [1, 4, 1]
    assert "cannot be captured: operation not permitted" in steps.graphs.reason
    assert steps.num_runs == 5  # two for the capture


def test_a_step_that_returns_more_than_tensors_runs_as_it_is_and_is_tried_once_a_generation(steps):
    own = steps.forward
    steps.forward = lambda number, cache: {**own(number, cache), "hidden_states": (number,)}
    cache = Memory()
    for _ in range(3):
        assert steps.run(cache, 0, number=number(1)) == (1, [1, 2], False)
        assert "more than tensors" in steps.graphs.reason
    assert steps.num_runs == 2 + 3


def test_captured_steps_are_given_back_with_their_cache_and_at_close(steps):
    cache, other = Memory(), Memory()
    for one in (cache, other):
        steps.run(one, 0, number=number(1))
    steps.step = None
    assert len(steps.capture.held) == 2
    del cache, one
    gc.collect()
    assert len(steps.capture.held) == 1
    steps.graphs.close()
    gc.collect()
    assert not steps.capture.held
    assert steps.run(other, 0, number=number(1)) == (1, [1, 2], False)
    assert "was closed" in steps.graphs.reason
