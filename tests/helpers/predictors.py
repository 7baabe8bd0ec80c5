"""Small random routes, every kind of predictor over them, and a predictor run along sequences."""

import numpy as np
import torch

from moeflow.predictors.ensemble import Ensemble
from moeflow.predictors.markov import Markov
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.path.net import PathNet, PathShape
from moeflow.predictors.path.predictor import PathPredictor
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.recorded import RecordedLookahead
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.net import SequenceNet, SequenceShape
from moeflow.predictors.sequence.predictor import SequencePredictor
from moeflow.predictors.sequence.token_table import TokenTable

L, E, K = 5, 8, 2


def random_routes(num_sequences=6, length=30, seed=0, num_tokens=12):
    """Sequences of random tokens and routes."""
    rng = np.random.default_rng(seed)
    token_ids = [rng.integers(0, num_tokens, length).astype(np.int32) for _ in range(num_sequences)]
    experts = [rng.random((length, L, E)).argsort(-1)[:, :, :K].astype(np.uint8) for _ in range(num_sequences)]
    weights = [-np.sort(-rng.dirichlet(np.ones(K), (length, L)), -1).astype(np.float16) for _ in range(num_sequences)]
    return Routes(token_ids, experts, weights, E)


def random_sequence_predictor(routes, seed=0):
    """A SequencePredictor with random parameters, its net and its table."""
    torch.manual_seed(seed)
    table = TokenTable.count(routes)
    shape = SequenceShape(L, E, len(table.known_ids), width=16, token_width=4, later_rank=4, num_later=3)
    net = SequenceNet(shape.within_limits(), table.popularity).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    return SequencePredictor(net.shape, table, arrays), net, table


def build(kind):
    """A fresh predictor that does not learn across sequences."""
    routes = random_routes(seed=9)
    torch.manual_seed(0)
    if kind == "popularity":
        return Popularity.train(routes)
    if kind == "markov":
        return Markov.train(routes)
    if kind == "path":
        net = PathNet(PathShape(L, E, num_rows=32, width=8, inner_width=16, num_heads=2, window=4))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return PathPredictor(net)
    if kind == "sequence":
        return random_sequence_predictor(routes)[0]
    if kind == "recorded":
        return RecordedLookahead(L, E, K, reach=2, num_ranks=4)
    return Ensemble([build("sequence"), build("markov"), build("popularity")], learning_rate=0)


def recorded_signal(experts, layer, seed):
    """Ids as a trace records them: [B, 2, 4]."""
    return np.random.default_rng(seed * 100 + layer).random((len(experts), 2, E)).argsort(-1)[:, :, :4]


def follow(predictor, routes, sequences, prompt=0, signal_seed=0):
    """Run a predictor along sequences side by side: before, refined (by layer) and later, of every step."""
    token_ids, experts, weights = (
        np.stack([arrays[s] for s in sequences]) for arrays in (routes.token_ids, routes.experts, routes.weights)
    )
    predictor.begin(len(sequences))
    if prompt:
        predictor.prefill(token_ids[:, :prompt], experts[:, :prompt], weights[:, :prompt])
    for t in range(prompt, token_ids.shape[1]):
        before = predictor.step(token_ids[:, t])
        later = predictor.later()
        refined = []
        for layer in range(L):
            signal = None
            if predictor.signal == "recorded":
                signal = recorded_signal(experts, layer, signal_seed + t)
            refined.append(predictor.observe(layer, experts[:, t, layer], weights[:, t, layer], signal))
        yield before, refined, later


def check_probabilities(answer, shape):
    assert answer.dtype == np.float32
    assert answer.shape == shape
    known = answer[~np.isnan(answer)]
    assert len(known)
    assert known.min() >= 0
    assert known.max() <= 1


def recall(answer, experts):
    """Share of experts [B, n, K] that are among the K likeliest of answer [B, n, E]."""
    likeliest = np.argsort(-answer, -1)[..., :K]
    return np.take_along_axis(multi_hot(experts, E), likeliest, -1).sum() / experts.size
