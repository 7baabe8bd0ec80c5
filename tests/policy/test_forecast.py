"""The worth of a slot: by enumeration, and in the cases where everybody knows the answer."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.policy.forecast import Forecast

L, E, STEPS = 3, 4, 4
UNKNOWN = np.full((L, E), 0.2)


def forecast(now, later, passed=0, usual=UNKNOWN, num_steps=STEPS):
    made = Forecast(L, E, num_steps)
    made.begin_step(None if now is None else np.asarray(now, np.float32), later, usual)
    for layer in range(passed):
        made.pass_layer(layer)
    return made


def turns_of(now, later, layer, passed):
    """When the turns of a layer come, in layers from now, and with which probability [E] each demands: a list."""
    turns = [(layer - passed + 1 + L * step, p) for step, p in enumerate([now[layer], *(row[layer] for row in later)])]
    return turns[1:] if layer < passed else turns


def best_bet(turns):
    """Try every last turn: P(demanded by then) over the layers the slot is kept on average."""
    best, lost, kept, before = 0.0, 1.0, 0.0, 0
    for away, probability in turns:
        kept += lost * (away - before)
        lost, before = lost * (1 - probability), away
        best = max(best, (1 - lost) / kept)
    return best


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, L))
def test_worth_is_that_of_the_best_bet(seed, passed):
    rng = np.random.default_rng(seed)
    now, later = rng.random((L, E)).astype(np.float32), rng.random((STEPS, L, E)).astype(np.float32)
    found = forecast(now, later, passed).worth
    for layer in range(L):
        turns = turns_of(now, later, layer, passed)
        expected = [best_bet([(away, float(p[expert])) for away, p in turns]) for expert in range(E)]
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, L))
def test_certain_predictions_order_experts_by_next_use(seed, passed):
    rng = np.random.default_rng(seed)
    demands = (rng.random((STEPS + 1, L, E)) < 0.4).astype(np.float32)
    worth = forecast(demands[0], demands[1:], passed).worth
    for layer in range(L):
        for expert in range(E):
            uses = [away for away, p in turns_of(demands[0], demands[1:], layer, passed) if p[expert]]
            np.testing.assert_allclose(worth[layer, expert], 1 / uses[0] if uses else 0, rtol=1e-5)


def test_a_layer_that_has_passed_is_needed_in_the_next_step_at_the_earliest():
    now, later = np.zeros((L, E)), np.zeros((STEPS, L, E), np.float32)
    now[0, 0], now[0, 1], later[0, 0, 1] = 1, 1, 1
    made = forecast(now, later)
    assert made.worth[0, 0] == made.worth[0, 1] == 1
    made.pass_layer(0)
    assert made.worth[0, 0] == 0  # whatever had been predicted for this step
    np.testing.assert_allclose(made.worth[0, 1], 1 / L)


def test_refining_replaces_what_is_known_better_and_keeps_the_rest():
    now, later = np.full((L, E), 0.3), np.full((STEPS, L, E), 0.3, np.float32)
    made = forecast(now, later, passed=1)
    before = made.worth.copy()
    made.refine(1, np.array([[0.9, np.nan, 0.1, np.nan]], np.float32))
    assert made.worth[1, 0] > before[1, 0]
    assert made.worth[1, 2] < before[1, 2]
    np.testing.assert_array_equal(made.worth[1, [1, 3]], before[1, [1, 3]])
    np.testing.assert_array_equal(made.worth[[0, 2]], before[[0, 2]])
    np.testing.assert_allclose(made.now[1], [0.9, 0.3, 0.1, 0.3], rtol=1e-6)


def test_what_nobody_predicts_goes_by_its_usual_rate():
    usual = np.full((L, E), 0.1)
    usual[1, 2] = 0.8
    for now, later in ((None, None), (np.full((L, E), np.nan), np.full((2, L, E), np.nan, np.float32))):
        made = forecast(now, later, usual=usual)
        np.testing.assert_allclose(made.now, usual, rtol=1e-6)
        assert made.worth[1].argmax() == 2
        assert np.isfinite(made.worth).all()


def test_the_last_step_foretold_stands_for_those_after_it():
    short, long = np.full((1, L, E), 0.4, np.float32), np.full((STEPS, L, E), 0.4, np.float32)
    now = np.full((L, E), 0.1)
    np.testing.assert_array_equal(forecast(now, short).worth, forecast(now, long).worth)


def test_layers_behind_those_that_are_predicted_have_their_usual_chances():
    now, usual = np.zeros((L, E)), np.full((L + 1, E), 0.4)
    whole = Forecast(L + 1, E, STEPS)
    whole.begin_step(np.vstack([now, usual[:1]]), np.stack([np.vstack([now, usual[:1]])] * STEPS), usual)
    part = Forecast(L + 1, E, STEPS)
    part.begin_step(now, np.stack([now] * 2), usual)
    assert np.array_equal(part.worth, whole.worth)
    assert (part.worth[L] > part.worth[:L].max()).all()
