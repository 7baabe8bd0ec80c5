"""The ensemble trusts the members that are right, among those that answer."""

import numpy as np
import pytest

from helpers.predictors import (
    E,
    K,
    L,
    recall,
)
from moeflow.errors import ConfigError
from moeflow.predictors.ensemble import Ensemble
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.popularity import Popularity


class Fixed:
    """Always of the same opinion; None is silence."""

    name, signal, reach, num_layers, num_experts = "fixed", "none", 0, L, E

    def __init__(self, opinion):
        self.opinion = opinion

    def begin(self, num_sequences):
        self.num_sequences = num_sequences

    def prefill(self, token_ids, experts, weights):
        pass

    def step(self, token_ids):
        if self.opinion is None:
            return None
        return np.repeat(self.opinion[None], self.num_sequences, 0).astype(np.float32)

    def observe(self, layer, experts, weights, signal=None):
        return None

    def later(self):
        return None


def test_ensemble_comes_to_trust_the_member_that_is_right():
    truth = np.full((L, K), [2, 5], np.uint8)
    right = multi_hot(truth, E) * 0.8 + 0.1
    ensemble = Ensemble([Fixed(1 - right), Fixed(right)])
    ensemble.begin(1)
    for _ in range(300):
        answer = ensemble.step(np.array([0]))
        for layer in range(L):
            ensemble.observe(layer, truth[None, layer], None)
    assert recall(answer, truth[None]) == 1
    assert (ensemble.weights[0, :, 1] > ensemble.weights[0, :, 0]).all()


def test_ensemble_goes_by_those_who_speak():
    opinion = np.random.default_rng(0).uniform(0.1, 0.9, (L, E)).astype(np.float32)
    ensemble = Ensemble([Fixed(None), Fixed(opinion)], learning_rate=0)
    ensemble.begin(1)
    np.testing.assert_allclose(ensemble.step(np.array([0]))[0], opinion, atol=1e-5)
    silent = Ensemble([Fixed(None), Fixed(np.full((L, E), np.nan))])
    silent.begin(1)
    assert silent.step(np.array([0])) is None


def test_ensemble_refuses_members_of_different_models():
    with pytest.raises(ConfigError, match="one model"):
        Ensemble([Popularity(L, E), Popularity(L + 1, E)])
