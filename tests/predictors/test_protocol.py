"""Every predictor obeys the protocol; what is computed for whole sequences is what is computed step by step."""

import numpy as np
import pytest
import torch

from moeflow.errors import ConfigError
from moeflow.predictors.ensemble import Ensemble
from moeflow.predictors.markov import Markov
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.path.net import PathNet, PathShape
from moeflow.predictors.path.predictor import PathPredictor
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.recorded import RecordedLookahead
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence import predictor as sequence
from moeflow.predictors.sequence.inputs import pad_inputs, sequence_inputs
from moeflow.predictors.sequence.net import SequenceNet, SequenceShape
from moeflow.predictors.sequence.predictor import SequencePredictor
from moeflow.predictors.sequence.token_table import TokenTable
from moeflow.predictors.sequence.training import train_sequence
from moeflow.predictors.training import TrainingOptions

L, E, K = 5, 8, 2
KINDS = ("popularity", "markov", "path", "sequence", "recorded", "ensemble")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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


def test_path_predictor_is_its_network_step_by_step():
    routes, predictor = random_routes(length=20), build("path")
    with torch.no_grad():
        whole = torch.sigmoid(predictor.net(torch.from_numpy(routes.token_ids[0].astype(np.int64))[None]))[0].numpy()
    for expected, (before, _, _) in zip(whole, follow(predictor, routes, [0]), strict=True):
        np.testing.assert_allclose(before[0], expected, atol=1e-5)


def test_training_inputs_do_not_know_the_sequence_they_belong_to():
    routes = random_routes(num_sequences=3)
    with_it, without_it = TokenTable.count(routes), TokenTable.count(routes.select([1, 2]))
    without_it.popularity = with_it.popularity
    sequence = routes.token_ids[0], routes.experts[0], routes.weights[0]
    left_out = sequence_inputs(with_it, *sequence, leave_out=True)
    never_seen = sequence_inputs(without_it, *sequence, leave_out=False)
    torch.testing.assert_close(left_out.evidence, never_seen.evidence, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left_out.context, never_seen.context)


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


def deterministic_routes(num_sequences=12, length=24):
    """Routes that follow from the token and the layer alone."""
    rng = np.random.default_rng(3)
    table = rng.random((6, L, E)).argsort(-1)[:, :, :K].astype(np.uint8)
    token_ids = [rng.integers(0, 6, length).astype(np.int32) for _ in range(num_sequences)]
    return Routes(token_ids, [table[ids] for ids in token_ids], None, E)


def recall(answer, experts):
    """Share of experts [B, n, K] that are among the K likeliest of answer [B, n, E]."""
    likeliest = np.argsort(-answer, -1)[..., :K]
    return np.take_along_axis(multi_hot(experts, E), likeliest, -1).sum() / experts.size


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


def test_markov_learns_online_which_experts_follow():
    markov, chain = Markov(L, E), np.array([[layer, layer + 1] for layer in range(L)], np.uint8)
    markov.begin(1)
    assert markov.step(np.array([0])) is None
    for _ in range(20):
        markov.step(np.array([0]))
        answers = [markov.observe(layer, chain[None, layer], None) for layer in range(L)]
    assert recall(markov.step(np.array([0])), chain[None]) == 1
    assert all(recall(answer, chain[None, None, layer + 1]) == 1 for layer, answer in enumerate(answers[:-1]))


def test_popularity_without_training_knows_nothing_at_first():
    popularity = Popularity(L, E)
    assert popularity.step(np.array([0])) is None
    for layer in range(L):
        popularity.observe(layer, np.array([[1, 2]]), None)
    assert recall(popularity.step(np.array([0])), np.full((1, L, K), [1, 2])) == 1


def test_recorded_ranks_become_the_rates_at_which_they_came_true():
    predictor = RecordedLookahead(L, E, K, reach=1, num_ranks=3)
    predictor.begin(1)
    said = np.array([[[0, 1, 2]]])
    for _ in range(400):
        predictor.step(np.array([0]))
        answers = [predictor.observe(layer, np.array([[0, 2]]), None, said) for layer in range(L)]
    first = answers[0]
    assert first[0, 0, 0] > 0.95
    assert first[0, 0, 1] < 0.05
    assert first[0, 0, 2] > 0.95
    assert first[0, 0, 3:].max() < 0.05


def test_recorded_says_nothing_of_a_layer_the_trace_says_nothing_of():
    predictor = RecordedLookahead(L, E, K, reach=2, num_ranks=3)
    predictor.step(np.array([0]))
    answer = predictor.observe(0, np.array([[0, 1]]), None, np.array([[[0, 1, 2], [255, 255, 255]]]))
    assert not np.isnan(answer[0, 0]).any()
    assert np.isnan(answer[0, 1]).all()


class Fixed:
    """Always of the same opinion; None is silence."""

    name, signal, reach, num_layers, num_experts = "fixed", "none", 0, L, E

    def __init__(self, opinion):
        self.opinion = opinion

    def begin(self, num_sequences):
        self.num_sequences = num_sequences

    def prefill(self, token_ids, experts, weights):
        pass

    def step(self, token_ids):
        if self.opinion is None:
            return None
        return np.repeat(self.opinion[None], self.num_sequences, 0).astype(np.float32)

    def observe(self, layer, experts, weights, signal=None):
        return None

    def later(self):
        return None


def test_ensemble_comes_to_trust_the_member_that_is_right():
    truth = np.full((L, K), [2, 5], np.uint8)
    right = multi_hot(truth, E) * 0.8 + 0.1
    ensemble = Ensemble([Fixed(1 - right), Fixed(right)])
    ensemble.begin(1)
    for _ in range(300):
        answer = ensemble.step(np.array([0]))
        for layer in range(L):
            ensemble.observe(layer, truth[None, layer], None)
    assert recall(answer, truth[None]) == 1
    assert (ensemble.weights[0, :, 1] > ensemble.weights[0, :, 0]).all()


def test_ensemble_goes_by_those_who_speak():
    opinion = np.random.default_rng(0).uniform(0.1, 0.9, (L, E)).astype(np.float32)
    ensemble = Ensemble([Fixed(None), Fixed(opinion)], learning_rate=0)
    ensemble.begin(1)
    np.testing.assert_allclose(ensemble.step(np.array([0]))[0], opinion, atol=1e-5)
    silent = Ensemble([Fixed(None), Fixed(np.full((L, E), np.nan))])
    silent.begin(1)
    assert silent.step(np.array([0])) is None


def test_ensemble_refuses_members_of_different_models():
    with pytest.raises(ConfigError, match="one model"):
        Ensemble([Popularity(L, E), Popularity(L + 1, E)])
