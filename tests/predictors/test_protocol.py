"""Every predictor obeys the protocol; what is computed for whole sequences is what is computed step by step."""

import numpy as np
import pytest
import torch

from helpers.predictors import (
    E,
    L,
    build,
    check_probabilities,
    follow,
    random_routes,
)

KINDS = ("popularity", "markov", "path", "sequence", "recorded", "ensemble")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_answers_have_the_protocols_shapes_and_are_probabilities(kind, num_sequences):
    predictor = build(kind)
    assert (predictor.num_layers, predictor.num_experts) == (L, E)
    for before, refined, later in follow(predictor, random_routes(), list(range(num_sequences)), prompt=4):
        if before is not None:
            check_probabilities(before, (num_sequences, L, E))
        assert (before is None) == (kind == "recorded")
        for layer, answer in enumerate(refined):
            known = min(predictor.reach, L - 1 - layer)
            assert (answer is not None) == (known > 0)
            if answer is not None:
                check_probabilities(answer, (num_sequences, known, E))
        if later is not None:
            check_probabilities(later, (num_sequences, 3, L, E))
        assert (later is not None) == (kind in ("sequence", "ensemble"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recorded"])
@pytest.mark.parametrize("prompt", [0, 7])
def test_sequences_side_by_side_are_predicted_as_one_by_one(kind, prompt):
    routes, predictor = random_routes(), build(kind)
    together = list(follow(predictor, routes, [0, 1, 2], prompt))
    for number in range(3):
        for (before, refined, later), (before_all, refined_all, later_all) in zip(
            follow(predictor, routes, [number], prompt), together, strict=True
        ):
            np.testing.assert_allclose(before[0], before_all[number], atol=1e-5)
            for one, several in zip(refined, refined_all, strict=True):
                if one is not None:
                    np.testing.assert_allclose(one[0], several[number], atol=1e-5)
            if later is not None:
                np.testing.assert_allclose(later[0], later_all[number], atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recorded"])
def test_a_prompt_leaves_the_state_its_steps_would(kind):
    routes, predictor = random_routes(), build(kind)
    by_steps = list(follow(predictor, routes, [0, 1]))[20:]
    by_prompt = list(follow(predictor, routes, [0, 1], prompt=20))
    for (before, _, _), (expected, _, _) in zip(by_prompt, by_steps, strict=True):
        np.testing.assert_allclose(before, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recorded"])
def test_padding_before_a_shorter_prompt_changes_nothing(kind):
    routes, predictor = random_routes(length=12), build(kind)
    token_ids, experts, weights = routes.token_ids[0][None], routes.experts[0][None], routes.weights[0][None]
    answers = []
    for padding in (0, 3):
        pad = ((0, 0), (padding, 0))
        predictor.begin(1)
        predictor.prefill(
            np.pad(token_ids, pad),
            np.pad(experts, (*pad, (0, 0), (0, 0)), constant_values=255),
            np.pad(weights, (*pad, (0, 0), (0, 0))),
        )
        answers.append(predictor.step(np.array([3])))
    np.testing.assert_allclose(*answers, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recorded"])
def test_begin_forgets_the_sequence_before(kind):
    routes, predictor = random_routes(), build(kind)
    fresh = next(follow(build(kind), routes, [1]))[0]
    for _ in follow(predictor, routes, [0]):
        pass
    np.testing.assert_allclose(next(follow(predictor, routes, [1]))[0], fresh, atol=1e-6)
