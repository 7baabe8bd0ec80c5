"""Recorded lookahead: ranks become rates, and silence stays silence."""

import numpy as np

from helpers.predictors import (
    E,
    K,
    L,
)
from moeflow.predictors.recorded import RecordedLookahead


def test_recorded_ranks_become_the_rates_at_which_they_came_true():
    predictor = RecordedLookahead(L, E, K, reach=1, num_ranks=3)
    predictor.begin(1)
    said = np.array([[[0, 1, 2]]])
    for _ in range(400):
        predictor.step(np.array([0]))
        answers = [predictor.observe(layer, np.array([[0, 2]]), None, said) for layer in range(L)]
    first = answers[0]
    assert first[0, 0, 0] > 0.95
    assert first[0, 0, 1] < 0.05
    assert first[0, 0, 2] > 0.95
    assert first[0, 0, 3:].max() < 0.05


def test_recorded_says_nothing_of_a_layer_the_trace_says_nothing_of():
    predictor = RecordedLookahead(L, E, K, reach=2, num_ranks=3)
    predictor.step(np.array([0]))
    answer = predictor.observe(0, np.array([[0, 1]]), None, np.array([[[0, 1, 2], [255, 255, 255]]]))
    assert not np.isnan(answer[0, 0]).any()
    assert np.isnan(answer[0, 1]).all()
