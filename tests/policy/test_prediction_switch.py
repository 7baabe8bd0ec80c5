"""The switch against made-up clocks: it ends where the steps are faster, and stops trying what keeps losing."""

import pytest

from moeflow.policy.prediction_switch import PredictionSwitch


def run(switch, num_steps, on_s, off_s, misses=1):
    """Feed steps that take on_s with prediction and off_s without."""
    modes, on = [], switch.on
    for _ in range(num_steps):
        on = switch.step(on_s if on else off_s, misses, 0.0)
        modes.append(on)
    return modes


def share(modes):
    return sum(modes) / len(modes)


def test_off_where_nothing_is_missed_and_on_again_when_misses_begin():
    switch = PredictionSwitch()
    modes = run(switch, 100, 1.0, 1.0, misses=0)
    assert not any(modes[20:])
    assert switch.reason == "nothing is missed"
    assert run(switch, 1, 1.0, 1.0, misses=1) == [True]
    assert switch.reason == "misses have begun"


def test_off_from_the_first_step_while_every_expert_has_room_and_on_when_none_has():
    switch = PredictionSwitch()
    assert not any(switch.rest() for _ in range(3))
    assert switch.reason == "every expert has room"
    assert run(switch, 1, 1.0, 1.0, misses=1) == [True]


def test_what_prefetch_prevents_counts_as_missed():
    """Without a single miss because everything was prefetched, prediction stays on but for the trials."""
    switch, modes = PredictionSwitch(), [True]
    for _ in range(2000):
        on = modes[-1]
        modes.append(switch.step(1.0 if on else 2.0, 0 if on else 3, 0.5 if on else 0.0))
    assert share(modes) > 0.95


@pytest.mark.parametrize(("on_s", "off_s", "faster"), [(1.2, 1.0, False), (1.0, 1.2, True), (1.03, 1.0, False)])
def test_the_faster_mode_is_chosen_by_trial(on_s, off_s, faster):
    switch = PredictionSwitch()
    run(switch, 200, on_s, off_s)
    assert switch.num_trials > 0
    modes = run(switch, 2000, on_s, off_s)
    assert share(modes) > 0.9 if faster else share(modes) < 0.1
    cost = sum(on_s if on else off_s for on in modes) / len(modes)
    assert cost < 1.02 * min(on_s, off_s)


def test_an_outlier_among_the_steps_decides_nothing():
    switch, on = PredictionSwitch(), True
    for number in range(400):
        slow = 100.0 if number % 10 == 0 else 1.0  # now and then, with prediction alone
        on = switch.step(slow if on else 1.2, 1, 0.0)
    assert switch.num_trials > 0
    assert switch.on


def test_a_gain_too_small_to_matter_keeps_it_off():
    switch = PredictionSwitch()
    assert share(run(switch, 3000, 0.995, 1.0)[-1000:]) < 0.1


def test_trials_get_rarer_while_they_agree():
    switch = PredictionSwitch()
    run(switch, 1000, 1.2, 1.0)
    early = switch.num_trials
    run(switch, 1000, 1.2, 1.0)
    late = switch.num_trials - early
    assert early >= 2
    assert late < early


def test_a_change_of_fortune_is_noticed():
    switch = PredictionSwitch()
    run(switch, 300, 1.2, 1.0)
    assert not switch.on
    assert share(run(switch, 4000, 1.0, 1.2)[-200:]) == 1
    assert share(run(switch, 8000, 1.2, 1.0)[-200:]) == 0


def test_steps_that_say_nothing_do_not_count():
    switch = PredictionSwitch()
    for _ in range(500):
        assert switch.step(None, 1, 0.0)
    assert switch.num_trials == 0
