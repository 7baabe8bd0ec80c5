"""Training the sequence predictor: what it learns, and that a sequence never sees itself in the counts."""

import numpy as np
import pytest
import torch

from helpers.predictors import (
    E,
    K,
    L,
    check_probabilities,
    random_routes,
    recall,
)
from moeflow.predictors.markov import Markov
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.inputs import sequence_inputs
from moeflow.predictors.sequence.token_table import TokenTable
from moeflow.predictors.sequence.training import train_sequence
from moeflow.predictors.training import TrainingOptions


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_training_inputs_do_not_know_the_sequence_they_belong_to():
    routes = random_routes(num_sequences=3)
    with_it, without_it = TokenTable.count(routes), TokenTable.count(routes.select([1, 2]))
    without_it.popularity = with_it.popularity
    sequence = routes.token_ids[0], routes.experts[0], routes.weights[0]
    left_out = sequence_inputs(with_it, *sequence, leave_out=True)
    never_seen = sequence_inputs(without_it, *sequence, leave_out=False)
    torch.testing.assert_close(left_out.evidence, never_seen.evidence, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left_out.context, never_seen.context)


def deterministic_routes(num_sequences=12, length=24):
    """Routes that follow from the token and the layer alone."""
    rng = np.random.default_rng(3)
    table = rng.random((6, L, E)).argsort(-1)[:, :, :K].astype(np.uint8)
    token_ids = [rng.integers(0, 6, length).astype(np.int32) for _ in range(num_sequences)]
    return Routes(token_ids, [table[ids] for ids in token_ids], None, E)


def test_sequence_predictor_learns_what_follows_from_the_token():
    routes = deterministic_routes()
    options = TrainingOptions(epochs=4, batch_size=4)
    predictor = train_sequence(routes, options, width=16, token_width=8, later_rank=4)
    predictor.begin(1)
    for token, experts in zip(routes.token_ids[0], routes.experts[0], strict=True):
        assert recall(predictor.step(token[None]), experts[None]) == 1
        for layer in range(L):
            predictor.observe(layer, experts[None, layer], None)


def test_a_model_of_one_layer_is_no_special_case():
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(0, 6, 20).astype(np.int32) for _ in range(4)]
    routes = Routes(token_ids, [(ids[:, None, None] % E).astype(np.uint8) for ids in token_ids], None, E)
    predictor = train_sequence(routes, TrainingOptions(epochs=1, batch_size=4), width=8, token_width=4, later_rank=4)
    for one in (predictor, Markov.train(routes)):
        one.begin(1)
        for t in range(6):
            check_probabilities(one.step(token_ids[0][t : t + 1]), (1, 1, E))
            assert one.observe(0, routes.experts[0][t : t + 1, 0], None) is None


def test_sequence_predictor_foresees_a_repetition():
    """Tokens 0 to 5 over and over, with routes no token was trained to have: what came before comes again."""
    predictor = train_sequence(
        random_routes(num_sequences=12, length=20), TrainingOptions(epochs=2, batch_size=4), width=16, token_width=8
    )
    period = random_routes(num_sequences=1, length=6, seed=5).experts[0]
    predictor.begin(1)
    for t in range(30):
        answer = predictor.step(np.array([100 + t % 6]))
        if t >= 12:
            assert recall(answer, period[None, t % 6]) == 1
        for layer in range(L):
            predictor.observe(layer, period[None, t % 6, layer], None)


def test_training_twice_with_one_seed_gives_the_same_predictor():
    routes, options = random_routes(), TrainingOptions(epochs=1, batch_size=4, seed=5)
    one, other = (train_sequence(routes, options, width=8, token_width=4, later_rank=4) for _ in range(2))
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
