"""Lookahead: early answers of folded routers, their calibration, and which of them are believed."""

import numpy as np
import pytest
import torch

from moeflow.predictors.lookahead import Lookahead

L, E, H, K = 5, 8, 32, 2


def routers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(E, H, generator=generator) for _ in range(L)]


def chosen(router, residual, bias=None):
    scores = residual @ router.T
    return (scores if bias is None else scores + bias).topk(K).indices.numpy()


def walk(lookahead, steps, models, rng, change=0.0):
    """Run steps on a residual stream that changes by `change` from layer to layer; return (answers, truths)."""
    answers = []
    for _ in range(steps):
        lookahead.step(None)
        residual = torch.from_numpy(rng.standard_normal((1, H)).astype(np.float32))
        truths, said = [], []
        for layer in range(L):
            residual = residual + change * torch.from_numpy(rng.standard_normal((1, H)).astype(np.float32))
            residual = residual / residual.pow(2).mean().sqrt()
            truths.append(chosen(models[layer], residual))
            said.append(lookahead.observe(layer, truths[-1], None, residual))
        answers.append((said, truths))
    return answers


def test_a_stream_that_stands_still_is_foreseen_exactly():
    models = routers()
    lookahead = Lookahead(models, [None] * L, [1e-6] * L, K, reach=3, stride=1)
    lookahead.begin(1)
    for said, truths in walk(lookahead, 30, models, np.random.default_rng(0)):
        for layer, answer in enumerate(said[:-1]):
            assert answer.shape == (1, min(3, L - 1 - layer), E)
            assert ((answer >= 0) & (answer <= 1)).all()
            for distance in range(answer.shape[1]):
                best = np.argsort(-answer[0, distance])[:K]
                assert set(best) == set(truths[layer + 1 + distance][0])


def test_only_every_stride_th_layer_is_asked():
    lookahead = Lookahead(routers(), [None] * L, [1e-6] * L, K, reach=4, stride=2)
    lookahead.begin(1)
    (said, _), *_ = walk(lookahead, 1, routers(), np.random.default_rng(0))
    assert [answer is None for answer in said] == [False, True, False, True, True]


def test_probabilities_become_what_really_happens():
    """On a stream that changes, an answer of 80 % comes true about four times of five."""
    models, rng = routers(), np.random.default_rng(1)
    lookahead = Lookahead(models, [None] * L, [1e-6] * L, K, reach=2, stride=1)
    lookahead.begin(1)
    walk(lookahead, 300, models, rng, change=0.6)
    foretold, happened = [], []
    for said, truths in walk(lookahead, 400, models, rng, change=0.6):
        for layer, answer in enumerate(said[:-1]):
            for distance in range(answer.shape[1]):
                hot = np.zeros(E)
                hot[truths[layer + 1 + distance][0]] = 1
                foretold.append(answer[0, distance])
                happened.append(hot)
    foretold, happened = np.concatenate(foretold), np.concatenate(happened)
    for low, high in ((0.05, 0.3), (0.3, 0.6), (0.6, 1.0)):
        inside = (foretold >= low) & (foretold < high)
        assert abs(foretold[inside].mean() - happened[inside].mean()) < 0.08


def test_a_router_that_does_not_choose_as_the_model_does_is_not_believed():
    models, others = routers(), routers(seed=9)
    mixed = [*models[:3], others[3], models[4]]
    lookahead = Lookahead(mixed, [None] * L, [1e-6] * L, K, reach=4, stride=1)
    lookahead.begin(1)
    *_, (said, _) = walk(lookahead, 30, models, np.random.default_rng(2))
    assert lookahead.usable.tolist() == [True, True, True, False, True]
    assert np.isnan(said[0][0, 2]).all()
    assert not np.isnan(said[0][0, [0, 1, 3]]).any()


def test_a_bias_and_fewer_experts_in_a_layer_count():
    models = routers()
    models[2] = models[2][:5]
    biases = [None, torch.linspace(-3, 3, E), None, None, None]
    lookahead = Lookahead(models, biases, [1e-6] * L, K, reach=2, stride=1)
    lookahead.begin(1)
    residual = torch.randn(1, H, generator=torch.Generator().manual_seed(3))
    residual = residual / residual.pow(2).mean().sqrt()
    lookahead.step(None)
    answer = lookahead.observe(0, chosen(models[0], residual), None, residual)
    assert set(np.argsort(-answer[0, 0])[:K]) == set(chosen(models[1], residual, biases[1])[0])
    assert answer[0, 1, 5:].max() < 1e-6
    assert set(np.argsort(-answer[0, 1])[:K]) == set(chosen(models[2], residual)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_answered_as_its_sequences(dtype):
    models = routers()
    residual = torch.randn(3, H, generator=torch.Generator().manual_seed(4)).to(dtype)
    experts = chosen(models[0], residual.float())
    together = Lookahead(models, [None] * L, [1e-6] * L, K)
    together.begin(3)
    together.step(None)
    answer = together.observe(0, experts, None, residual)
    for row in range(3):
        alone = Lookahead(models, [None] * L, [1e-6] * L, K)
        alone.begin(1)
        alone.step(None)
        single = alone.observe(0, experts[row : row + 1], None, residual[row : row + 1])
        assert np.array_equal(np.argsort(single[0]), np.argsort(answer[row]))


def test_what_is_asked_on_the_streams_device_is_what_is_seen_of_the_stream():
    """Both ways learn, check and answer alike: a router that is wrong is found by either."""
    models, others, rng = routers(), routers(seed=9), np.random.default_rng(2)
    mixed, biases = (
        [*models[:3], others[3], models[4]],
        [torch.randn(E, generator=torch.Generator().manual_seed(1))] * L,
    )
    for biased in ([None] * L, biases):
        seeing, asking = (Lookahead(mixed, biased, [1e-6] * L, K, reach=4, stride=2) for _ in range(2))
        for each in (seeing, asking):
            each.begin(2)
        for _ in range(20):
            residual, answers = torch.from_numpy(rng.standard_normal((2, H)).astype(np.float32)), 0
            for each in (seeing, asking):
                each.step(None)
            for layer in range(L):
                truth = chosen(models[layer], residual, biased[layer])
                asked = asking.ask(layer, residual)
                said = [
                    seeing.observe(layer, truth, None, residual),
                    asking.observe(layer, truth, None, None if asked is None else asked.numpy()),
                ]
                assert (said[0] is None) == (said[1] is None)
                if said[0] is not None:
                    np.testing.assert_allclose(said[1], said[0], rtol=1e-4, atol=1e-6)
                    answers += 1
            assert answers == 2
        assert asking.usable.tolist() == seeing.usable.tolist() == [True, True, True, False, True]
        assert asking.ask(1, residual) is None
