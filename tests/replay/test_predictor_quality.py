"""A predictor's recall and precision are those that a brute-force count gives."""

import numpy as np
import pytest
import torch

from helpers.small_traces import make_trace
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.training import TrainingOptions
from moeflow.replay.predictor_quality import PredictionQuality, evaluate_predictor
from moeflow.trace.format import PREFILL
from moeflow.trace.train_predictor import open_predictor, train_predictor

L, E, K = 4, 8, 2
TINY = {"width": 8, "token_width": 4, "later_rank": 4}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Noise:
    """Answers that depend on what was asked alone, so that they can be counted a second time."""

    name, signal, reach, num_layers, num_experts = "noise", "none", 2, L, E

    def begin(self, num_sequences):
        self.num_sequences = num_sequences
        self.prompt = None

    def prefill(self, token_ids, experts, weights):
        self.prompt = experts

    def step(self, token_ids):
        self.token_ids = token_ids
        return np.stack([self.say(token, 0) for token in token_ids])

    def observe(self, layer, experts, weights, signal=None):
        known = min(2, L - 1 - layer)
        if not known or layer == 1:  # silent after layer 1: what was said before stands
            return None
        answers = np.stack([self.say(token, 1 + layer) for token in self.token_ids])
        return answers[:, layer + 1 : layer + 1 + known]

    def later(self):
        return None

    @staticmethod
    def say(token, when):
        return np.random.default_rng([int(token), when]).random((L, E)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt", [0, 5])
def test_figures_are_those_of_counting_one_by_one(batch_size, prompt):
    trace = make_trace(6, prompt=prompt)
    figures = evaluate_predictor(Noise(), trace, [0, 2, 5], batch_size=batch_size)
    before, next_layer = {4: [], 6: [], 8: []}, {4: [], 6: [], 8: []}
    for place in (0, 2, 5):
        rows = trace.sequences()[place]
        for row in range(rows.start, rows.stop):
            if trace.phase[row] == PREFILL:
                continue
            token = trace.token_ids[row]
            latest = Noise.say(token, 0)
            for layer in range(L):
                demanded = set(trace.experts[row, layer].tolist())
                for k, counted in before.items():
                    counted += [e in np.argsort(-Noise.say(token, 0)[layer])[:k] for e in demanded]
                if layer:
                    for k, counted in next_layer.items():
                        counted += [e in np.argsort(-latest[layer])[:k] for e in demanded]
                if layer != 1:
                    latest[layer + 1 : layer + 3] = Noise.say(token, 1 + layer)[layer + 1 : layer + 3]
    for name, counts in (("all_layers", before), ("next_layer", next_layer)):
        for k, counted in counts.items():
            assert figures[name][f"recall@{k}"] == pytest.approx(np.mean(counted))
        assert figures[name]["precision@4"] == pytest.approx(np.mean(counts[4]) * K / 4)
    assert figures["tokens"] == len(before[4]) / (L * K)


def test_a_trained_sequence_predictor_recalls_a_deterministic_model(tmp_path):
    trace = make_trace(24)
    options = TrainingOptions(epochs=4, batch_size=4)
    train_predictor(trace, "sequence", tmp_path / "p", options=options, **{**TINY, "width": 16})
    predictor, _ = open_predictor(tmp_path / "p", trace)
    figures = evaluate_predictor(predictor, trace)
    assert figures["all_layers"]["recall@2"] == 1
    assert figures["next_layer"]["recall@2"] == 1


@pytest.mark.parametrize("name", ["popularity", "markov"])
def test_baselines_need_no_file(name):
    trace = make_trace()
    predictor, _ = open_predictor(name, trace)
    figures = evaluate_predictor(predictor, trace)
    assert 0 < figures["all_layers"]["recall@4"] < figures["all_layers"]["recall@6"] <= 1
    assert figures["all_layers"]["recall@8"] == 1  # there are no more than 8


def test_batch_recall_counts_the_union_of_a_batch():
    quality = PredictionQuality(num_layers=1, top_k=1)
    probability = multi_hot(np.array([[[0]], [[1]], [[2]]]), 4)
    demanded = multi_hot(np.array([[[1]], [[0]], [[3]]]), 4)
    quality.add(0, 0, probability, demanded)
    assert quality.batch_recall() == pytest.approx(2 / 3)
    assert quality.as_dict(0)["recall@1"] == 0


def test_quality_of_nothing_is_none():
    quality = PredictionQuality(num_layers=2, top_k=2)
    quality.add(0, 0, np.full((1, 2, 8), np.nan), np.zeros((1, 2, 8)))
    assert quality.as_dict(0)["recall@4"] is None
    assert quality.batch_recall() is None
