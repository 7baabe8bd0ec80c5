"""Popularity counts, from nothing as well."""

import numpy as np

from helpers.predictors import (
    E,
    K,
    L,
    recall,
)
from moeflow.predictors.popularity import Popularity


def test_popularity_without_training_knows_nothing_at_first():
    popularity = Popularity(L, E)
    assert popularity.step(np.array([0])) is None
    for layer in range(L):
        popularity.observe(layer, np.array([[1, 2]]), None)
    assert recall(popularity.step(np.array([0])), np.full((1, L, K), [1, 2])) == 1
