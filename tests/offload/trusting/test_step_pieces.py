"""Asking steps in pieces: experts run between them as ever, on what the pieces leave, and nothing else of the model.

CUDA graphs are stood in for by recorded operations on CPU tensors. That whole models keep their bits is told by
`moe/test_trusted_pass.py`.
"""

import gc

import pytest
import torch

from helpers.recorded_capture import RecordedCapture
from moeflow.offload.trusting.step_pieces import StepPieces


class Memory:
    """Of a generation: a sum so far, kept at a position."""

    def __init__(self, capacity=4):
        self.capacity, self.position, self.sums = capacity, torch.zeros(1, dtype=torch.int64), torch.zeros(capacity)

    @property
    def memory(self):
        return [self.position, self.sums]


class Steps:
    """Runs steps of a small model: two layers, whose experts multiply by what the host looks up."""

    def __init__(self):
        self.capture, self.num_runs, self.num_begun, self.asked, self.fails = RecordedCapture(), 0, 0, [], False
        self.shown = []
        self.pieces = StepPieces(self.capture)
        self.layers = [0, 1]

    def begin(self):
        self.num_begun += 1

    def experts(self, layer, hidden, index, weights):
        if self.pieces.cutting is not None:
            return self.pieces.cutting.add(layer, lambda: self.behind(layer), (hidden, index, weights))
        if self.fails:
            raise OSError("an expert cannot be read")
        self.asked.append((layer, int(index)))  # waits for the device
        return hidden * float(index) * weights

    def behind(self, layer):
        return lambda *routed: self.experts(layer, *routed)

    def forward(self, number, cache):
        self.num_runs += 1
        hidden = number.view(1, 1)
        for layer in self.layers:
            before = hidden + layer
            hidden = hidden + self.experts(layer, before, before.long() + layer, torch.full((1, 1), 0.5))
        cache.sums.index_copy_(0, cache.position, hidden.view(1))
        return {"total": cache.sums.sum().view(1), "cache": cache}

    def run(self, cache, position, value, kind=None):
        """Run a step; return its total."""
        cache.position.fill_(position)
        given = {"number": torch.tensor([float(value)]), "cache": cache}
        return float(self.pieces.run(self.begin, cache, self.forward, (), given, kind=kind)["total"])


@pytest.fixture
def steps():
    return Steps()


def alone(values):
    """Return the totals of steps that are never captured, and what their experts were asked for."""
    steps, cache, totals = Steps(), Memory(), []
    for position, value in enumerate(values):
        cache.position.fill_(position)
        totals.append(float(steps.forward(torch.tensor([float(value)]), cache)["total"]))
    return totals, steps.asked


def test_pieces_are_captured_once_and_experts_run_between_them_on_what_they_leave(steps):
    values, cache = (1, 3, 2, 5), Memory()
    totals, asked = alone(values)
    assert [steps.run(cache, position, value) for position, value in enumerate(values)] == totals
    assert steps.asked == asked
    assert (steps.num_runs, steps.capture.num_captured, steps.capture.num_replayed) == (2, 1, 4 * 3)
    assert steps.num_begun == 4
    assert steps.pieces.as_dict() == {"captured": 1, "replayed": 4, "not_replayed": None}


def test_no_experts_run_while_a_step_is_captured(steps):
    steps.run(Memory(), 0, 1)
    assert len(steps.asked) == 2


def test_steps_of_another_kind_are_captured_apart(steps):
    cache = Memory()
    for kind in (False, True, False, True):
        steps.run(cache, 0, 1, kind)
    assert steps.capture.num_captured == 2


def test_memory_that_was_moved_is_captured_anew(steps):
    cache = Memory()
    first = steps.run(cache, 0, 1)
    cache.sums, cache.capacity = torch.cat((cache.sums, torch.zeros(4))), 8
    assert steps.run(cache, 4, 1) == 2 * first
    assert steps.capture.num_captured == 2


def test_an_error_of_experts_is_raised_and_the_next_step_is_right(steps):
    cache = Memory()
    first = steps.run(cache, 0, 1)
    steps.fails = True
    with pytest.raises(OSError, match="cannot be read"):
        steps.run(cache, 0, 3)
    steps.fails = False
    assert steps.run(cache, 0, 1) == first
    assert steps.num_runs == 2


def test_experts_that_are_called_in_another_order_or_number_run_as_they_are(steps):
    values = (1, 3)
    for layers in ([[0, 1], [1, 0]], [[0, 1], [0]], [[0], [0, 1]], [[], []]):
        steps.num_runs, cache = 0, Memory()
        own = steps.forward

        def forward(number, cache, own=own, layers=layers):
            steps.layers = layers[steps.num_runs] if steps.num_runs < 2 else [0, 1]
            return own(number, cache)

        steps.forward = forward
        assert [steps.run(cache, position, value) for position, value in enumerate(values)] == alone(values)[0]
        assert "in another order or number" in steps.pieces.reason
        assert steps.num_runs == 2 + 2
        assert steps.pieces.cutting is None
        steps.forward = own
    assert steps.pieces.num_captured == 0


def test_a_step_that_waits_for_the_device_is_tried_once(steps):
    own = steps.forward

    def waits(number, cache):
        made = own(number, cache)
        return {**made, "total": made["total"] * (2 if bool(number > 1) else 1)}

    steps.forward = waits
    totals = alone((1, 3))[0]
    cache = Memory()
    assert [steps.run(cache, position, value) for position, value in enumerate((1, 3))] == [totals[0], 2 * totals[1]]
    assert "cannot be captured: operation not permitted" in steps.pieces.reason
    assert steps.pieces.cutting is None
    assert steps.num_runs == 2 + 2


def test_pieces_are_given_back_with_their_cache_and_at_close(steps):
    cache, other = Memory(), Memory()
    for one in (cache, other):
        steps.run(one, 0, 1)
    assert len(steps.capture.held) == 2 * 3
    del cache, one
    gc.collect()
    assert len(steps.capture.held) == 3
    steps.pieces.close()
    gc.collect()
    assert not steps.capture.held
    assert steps.run(other, 0, 1) == alone((1,))[0][0]
    assert "was closed" in steps.pieces.reason
