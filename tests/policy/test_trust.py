"""Whether a decode step is trusted: by the share of steps that miss nothing, and by the times of both kinds."""

from moeflow.policy.trust import Trust


def _seen(*missed):
    trust = Trust()
    for one in missed:
        trust.asked(one, 1.0)
    return trust


def test_nothing_is_trusted_before_eight_steps_were_seen():
    assert not _seen(*[False] * 7).pays
    assert _seen(*[False] * 8).pays


def test_steps_that_miss_often_are_not_trusted():
    assert not _seen(*[True, False] * 6).pays
    assert _seen(*[True], *[False] * 11).pays


def test_a_trusted_step_that_is_no_faster_does_not_pay():
    trust = _seen(*[False] * 10)
    trust.trusted(False, 0.5)
    assert trust.pays
    slow = _seen(*[False] * 10)
    slow.trusted(False, 1.1)
    assert not slow.pays


def test_repetitions_cost_as_much_as_the_steps_that_they_repeat():
    trust = _seen(*[False] * 10)
    for _ in range(8):
        trust.trusted(False, 0.9)
    assert trust.pays
    for _ in range(3):
        trust.trusted(True, 0.9)  # now a quarter is repeated, at a gain of a tenth
    assert not trust.pays
    assert trust.steps == {True: 8, False: 3}


def test_nothing_is_trusted_where_a_layer_must_ask():
    trust = _seen(*[False] * 10)
    trust.is_possible = False
    assert not trust.pays
