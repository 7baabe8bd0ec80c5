"""Training on a trace never sees the held-out sequences, and the figures are those a brute-force count gives."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.small_traces import make_trace
from moeflow.errors import ConfigError, PredictorError
from moeflow.policy.prefetch_ledger import PredictionQuality
from moeflow.predictors.files import load_predictor
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.training import TrainingOptions
from moeflow.trace.trace import PREFILL
from moeflow.trace.train_predictor import (
    evaluate_predictor,
    open_predictor,
    split_sequences,
    trace_routes,
    train_predictor,
)

L, E, K = 4, 8, 2
TINY = {"width": 8, "token_width": 4, "later_rank": 4}
ONE_EPOCH = TrainingOptions(epochs=1, batch_size=4)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_every_fifth_sequence_that_is_no_duplicate_is_held_out():
    training, held_out = split_sequences(make_trace(12, duplicates=(1, 3)))
    assert held_out == [6, 11]
    assert training == [0, 2, 4, 5, 7, 8, 9, 10]


def test_a_trace_with_too_few_sequences_is_refused():
    with pytest.raises(ConfigError, match=r"4 sequence\(s\), too few to hold out every 5th"):
        split_sequences(make_trace(4))
    with pytest.raises(ConfigError, match="hold_out is 1"):
        split_sequences(make_trace(12), 1)


@pytest.mark.parametrize("kind", ["path", "sequence"])
def test_held_out_sequences_have_no_influence_on_training(kind, tmp_path):
    sizes = TINY if kind == "sequence" else {"num_rows": 16, "width": 8, "inner_width": 8, "num_heads": 2}
    trace, changed = make_trace(), make_trace()
    for place in split_sequences(trace)[1]:
        changed._rows["experts"][changed.sequences()[place]] = (0, 1)
    written = []
    for number, one in enumerate((trace, changed)):
        train_predictor(one, kind, tmp_path / str(number), options=ONE_EPOCH, **sizes)
        written.append(load_file(tmp_path / str(number)))
    for name, array in written[0].items():
        np.testing.assert_array_equal(array, written[1][name])


def test_a_trained_file_says_what_it_was_trained_on(tmp_path):
    trace = make_trace()
    card = train_predictor(trace, "sequence", tmp_path / "p", hold_out=4, options=ONE_EPOCH, **TINY)
    assert load_predictor(tmp_path / "p")[1] == card
    routes = trace_routes(trace, split_sequences(trace, 4)[0])
    assert card.fingerprint == "model-a"
    assert card.trained_on == {"trace": "trace", "sequences": 9, "tokens": routes.num_tokens, "hold_out": 4}
    assert open_predictor(tmp_path / "p", trace)[1] == 4


def test_training_that_is_interrupted_leaves_no_file(tmp_path):
    def interrupt(share, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_predictor(make_trace(), "sequence", tmp_path / "p", options=ONE_EPOCH, progress=interrupt, **TINY)
    assert not list(tmp_path.iterdir())


def test_progress_goes_from_begin_to_end_without_falling_back(tmp_path):
    shares = []
    train_predictor(
        make_trace(),
        "sequence",
        tmp_path / "p",
        options=TrainingOptions(epochs=2, batch_size=4),
        progress=lambda share, text: shares.append(share),
        **TINY,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match="'oracle' cannot be trained"):
        train_predictor(make_trace(), "oracle", tmp_path / "p")
    with pytest.raises(ConfigError, match="epochs is 0"):
        TrainingOptions(epochs=0)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        train_predictor(make_trace(), "path", tmp_path / "p", options=TrainingOptions(device="abacus"))
    with pytest.raises(PredictorError, match="no such folder"):
        train_predictor(make_trace(), "path", tmp_path / "no" / "p")
    with pytest.raises(PredictorError, match="it is a folder"):
        train_predictor(make_trace(), "path", tmp_path)
    with pytest.raises(ConfigError, match="seed is -1"):
        TrainingOptions(seed=-1)


def test_a_predictor_of_another_model_is_not_opened(tmp_path):
    train_predictor(make_trace(), "sequence", tmp_path / "p", options=ONE_EPOCH, **TINY)
    with pytest.raises(PredictorError, match="model model-a, and model model-b is wanted"):
        open_predictor(tmp_path / "p", make_trace(fingerprint="model-b"))


def test_lookahead_is_opened_only_where_the_trace_holds_one():
    with pytest.raises(ConfigError, match="holds no lookahead"):
        open_predictor("lookahead", make_trace())
    predictor, _ = open_predictor("lookahead", make_trace(lookahead=(2, 4)))
    assert predictor.reach == 2


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
