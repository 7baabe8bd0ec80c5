"""The sequence predictor is its network step by step, within bounded memory, and sees its past alone."""

import numpy as np
import pytest
import torch

from helpers.predictors import (
    E,
    L,
    follow,
    random_routes,
    random_sequence_predictor,
)
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence import predictor as sequence
from moeflow.predictors.sequence.inputs import pad_inputs, sequence_inputs


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_sequence_predictor_is_its_network_step_by_step():
    routes = random_routes(length=40)
    predictor, net, table = random_sequence_predictor(random_routes(seed=9))
    one = sequence_inputs(table, routes.token_ids[0], routes.experts[0], routes.weights[0], leave_out=False)
    with torch.no_grad():
        logits, states, _ = net(pad_inputs([one]))
        refined, exists = net.refined(logits[0], one.routes.view(-1, L, E))
        expected_later = torch.sigmoid(net.later(one, logits[0], states[0], torch.arange(40))).numpy()
    expected, refined = torch.sigmoid(logits[0]).numpy(), torch.sigmoid(refined).numpy()
    for t, (before, answers, later) in enumerate(follow(predictor, routes, [0])):
        np.testing.assert_allclose(before[0], expected[t], atol=1e-4)
        np.testing.assert_allclose(later[0], expected_later[t], atol=1e-4)
        for layer, answer in enumerate(answers[:-1]):
            np.testing.assert_allclose(answer[0], refined[t, layer][exists[layer]], atol=1e-4)


def test_a_long_sequence_is_remembered_in_bounded_memory(monkeypatch):
    """With a memory of 64 steps nothing older is known, and all that is younger is as it was."""
    monkeypatch.setattr(sequence, "_MEMORY_STEPS", 64)
    routes = random_routes(num_sequences=1, length=300, num_tokens=400)
    predictor, _, _ = random_sequence_predictor(random_routes(seed=9))
    for _ in follow(predictor, routes, [0]):
        pass
    past = predictor._past[0]
    hot = multi_hot(routes.experts[0], E).reshape(300, -1)
    np.testing.assert_array_equal(np.stack([past.at(t) for t in range(236, 300)]), hot[236:])
    assert not past.at(235).any()
    np.testing.assert_array_equal(past.after(295, 7), hot[[296, 297, 298, 299, 295, 296, 297]])
    assert len(past._recall) < 130


def test_a_step_is_predicted_from_its_past_alone():
    routes = random_routes(num_sequences=2)
    predictor, _, _ = random_sequence_predictor(random_routes(seed=9))
    changed = Routes(routes.token_ids, [experts.copy() for experts in routes.experts], routes.weights, E)
    changed.experts[0][10:] = (changed.experts[0][10:] + 1) % E
    for t, (one, other) in enumerate(
        zip(follow(predictor, routes, [0]), list(follow(predictor, changed, [0])), strict=True)
    ):
        if t <= 10:
            np.testing.assert_array_equal(one[0], other[0])
