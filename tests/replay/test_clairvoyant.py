"""A clairvoyant says what a trace demands next."""

import numpy as np

from helpers.fake_predictor import random_routes
from helpers.link_traces import E, K, L
from moeflow.replay.clairvoyant import Clairvoyant


def test_a_clairvoyant_says_what_comes():
    routes = [random_routes(3, L, E, K, seed) for seed in (0, 1)]
    predictor = Clairvoyant(routes, E, num_steps=2)
    for sequence in routes:
        predictor.begin(1)
        for row in range(3):
            said = predictor.step(np.zeros(1))[0]
            for layer in range(L):
                assert set(np.flatnonzero(said[layer])) == set(sequence[row, layer])
            later = predictor.later()[0]
            assert later[0].any() == (row < 2)  # nothing after the end
            assert row == 2 or set(np.flatnonzero(later[0, 0])) == set(sequence[row + 1, 0])
