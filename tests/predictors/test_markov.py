"""Markov learns which experts follow which, online as well."""

import numpy as np

from helpers.predictors import (
    E,
    L,
    recall,
)
from moeflow.predictors.markov import Markov


def test_markov_learns_online_which_experts_follow():
    markov, chain = Markov(L, E), np.array([[layer, layer + 1] for layer in range(L)], np.uint8)
    markov.begin(1)
    assert markov.step(np.array([0])) is None
    for _ in range(20):
        markov.step(np.array([0]))
        answers = [markov.observe(layer, chain[None, layer], None) for layer in range(L)]
    assert recall(markov.step(np.array([0])), chain[None]) == 1
    assert all(recall(answer, chain[None, None, layer + 1]) == 1 for layer, answer in enumerate(answers[:-1]))
