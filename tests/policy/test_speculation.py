"""The gate of speculation on a simulated clock: how long drafts are, and what they may cost."""

import itertools
import random

import pytest

from moeflow.policy.speculation import Acceptance, SpeculationGate
from moeflow.policy.step_times import Step, StepTimes, union_share


def warm(gate, num_sequences=1, plain_s=1.0, steps=8):
    for _ in range(steps):
        gate.finish(num_sequences, 0, num_sequences, Step(plain_s))


class Clock:
    """A model whose steps take what the union of their experts takes, and accept drafts with a probability."""

    def __init__(self, gate, chance, growth, *, promised=None, seed=0):
        self.gate, self.chance, self.growth = gate, chance, growth
        self.promised = chance if promised is None else promised
        self.acceptance = Acceptance()
        self.draw = random.Random(seed)
        self.seconds = self.tokens = 0.0

    def run(self, steps):
        for _ in range(steps):
            likely = [self.acceptance.probability("told", place, self.promised) for place in range(7)]
            (count,) = self.gate.choose(1, [likely])
            tokens = 1
            for place in range(count):
                accepted = self.draw.random() < self.chance
                self.acceptance.judge("told", place, self.promised, accepted=accepted)
                if not accepted:
                    break
                tokens += 1
            step_s = self.growth(count) * (1 + 0.05 * self.draw.random())
            self.gate.finish(1, count, tokens, Step(step_s))
            self.seconds, self.tokens = self.seconds + step_s, self.tokens + tokens
        return self

    @property
    def speed(self):
        """Tokens a second, in times of those without drafts."""
        return self.tokens / self.seconds * 1.025 * self.growth(0)


def free(drafted):
    return 1.0 + 0.05 * drafted


def by_union(num_experts, top_k):
    return lambda drafted: union_share(1 + drafted, num_experts, top_k) / union_share(1, num_experts, top_k)


@pytest.mark.parametrize(
    ("chance", "growth", "promised"),
    [
        (0.0, by_union(64, 4), 0.9),
        (0.3, by_union(64, 4), 0.9),
        (0.6, by_union(64, 4), 0.6),
        (0.9, by_union(8, 2), 0.9),
        (0.0, free, 0.9),
        (0.2, lambda drafted: 1.0 + 0.5 * drafted, 0.8),
        (0.5, lambda drafted: 1.0 + (drafted > 0), 0.9),
    ],
)
@pytest.mark.parametrize("steps", [256, 2000])
def test_it_is_never_more_than_3_percent_slower_than_without(chance, growth, promised, steps):
    speeds = [
        Clock(SpeculationGate(StepTimes(64, 4), 7), chance, growth, promised=promised, seed=seed).run(steps).speed
        for seed in range(3)
    ]
    assert min(speeds) > 0.97, speeds


def test_it_gains_where_drafts_are_good_and_rows_cost_little():
    clock = Clock(SpeculationGate(StepTimes(64, 4), 7), 0.8, free).run(2000)
    assert clock.speed > 2
    assert clock.gate.is_on
    assert clock.gate.gains.gained_s > 10 * clock.gate.gains.lost_s


def test_it_is_off_by_itself_with_a_reason_and_tried_ever_more_rarely():
    gate = SpeculationGate(StepTimes(), 7)
    clock = Clock(gate, 0.0, lambda drafted: 1.0 + drafted, promised=0.9)
    clock.acceptance.probability = lambda source, place, promised: promised  # a source that is believed whatever comes
    gate.times.of = lambda *rows, waits=True: 1.0  # and times that are always wrong: the ledger is left
    offs, was_on = [], True
    for step in range(4000):
        clock.run(1)
        if was_on and not gate.is_on:
            offs.append(step)
            assert gate.reason == "slower than plain steps by the clock"
        was_on = gate.is_on
    gaps = [after - before for before, after in itertools.pairwise(offs)]
    assert len(gaps) >= 2
    assert gaps == sorted(gaps)
    assert gaps[-1] > 3 * gaps[0], gaps


def test_the_more_the_union_grows_the_shorter_the_drafts():
    def chosen(num_experts, top_k):
        gate = SpeculationGate(StepTimes(), 7)
        warm(gate)
        for drafted in range(1, 8):
            for _ in range(3):
                gate.times.add(1, drafted, Step(by_union(num_experts, top_k)(drafted)))
        return sum(gate.choose(1, [[0.85] * 7]))

    lengths = [chosen(num_experts, 4) for num_experts in (4, 5, 6, 8, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 7
    assert lengths[-1] == 0


def waiting_gate(num_sequences=1, waited_s=0.5):
    """A gate whose plain steps take 1.0, half of it in waiting; each drafted token adds 0.05 and as long a wait."""
    gate = SpeculationGate(StepTimes(), 7)
    for _ in range(24):
        gate.finish(num_sequences, 0, num_sequences, Step(0.5 + waited_s, waited_s))
    for drafted in range(1, 8):
        for _ in range(15):
            waits = waited_s * (1 + drafted)
            gate.times.add(num_sequences, drafted, Step(0.5 + 0.05 * drafted + waits, waits))
    return gate


def test_steps_of_a_cold_memory_are_not_what_plain_steps_take():
    """The first ones wait four times as long as all the others, and a draft adds a wait of its own."""
    gate, seconds, tokens = SpeculationGate(StepTimes(), 7), 0.0, 0
    for number in range(300):
        (count,) = gate.choose(1, [[0.9] * 3])
        waited_s = (4.0 if number < 12 else 1.0) + 1.2 * count
        gate.finish(1, count, 1 + (count > 0), Step(0.5 + waited_s, waited_s))
        seconds, tokens = seconds + 0.5 + waited_s, tokens + 1 + (count > 0)
    plain_s = 12 * 4.5 + 1.5 * (tokens - 12)
    assert seconds < 1.03 * plain_s


def test_experts_that_come_in_vain_cost_those_that_they_drive_out():
    """Of two drafts that wait as long, the one that is sure to come pays where the other does not."""
    likely = [waiting_gate().choose(1, [[chance]], lambda tokens: [0.0, 0.3]) for chance in (0.5, 0.95)]
    assert likely == [[0], [1]]


def test_a_draft_whose_experts_are_in_memory_is_longer_than_one_that_waits():
    def chosen(first, each, chance=0.7):
        return sum(waiting_gate().choose(1, [[chance] * 7], lambda tokens: [first, *[each] * len(tokens)]))

    lengths = [chosen(0.0, each) for each in (0.0, 0.05, 0.2, 0.5, 2.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] >= 4
    assert lengths[-1] == 0
    assert chosen(0.5, 0.0) >= 4  # what the last token waits for is no draft's fault


def test_a_draft_is_cut_before_the_token_that_waits():
    gate = waiting_gate()
    assert gate.choose(1, [[0.8] * 7], lambda tokens: [0.0, *(2.0 * (place == 3) for _, place in tokens)]) == [3]


def test_experts_that_plain_steps_would_wait_for_too_are_no_loss():
    """What is sure to come has to be read in any case."""
    for each in (0.1, 0.5, 1.4):
        found = waiting_gate().choose(1, [[1.0]], lambda tokens, each=each: [0.5, *[each] * len(tokens)])
        assert found == [1]
        assert waiting_gate().choose(1, [[0.2]], lambda tokens, each=each: [0.5, *[each] * len(tokens)]) == [0]


def test_a_wait_that_the_ledger_could_not_pay_is_not_tried():
    assert waiting_gate().choose(1, [[1.0] * 7], lambda tokens: [0.0, *[4.0] * len(tokens)]) == [0]


def test_waits_are_asked_in_the_order_in_which_tokens_are_taken():
    asked = []
    gate = waiting_gate(3)
    counts = gate.choose(3, [[0.9, 0.9], [0.1], [0.95]], lambda tokens: asked.append(tokens) or [0.0] * 5)
    assert asked == [[(2, 0), (0, 0), (0, 1), (1, 0)]]
    assert counts == [2, 0, 1]


def test_where_waits_are_not_known_the_measured_ones_count():
    """A token of 0.5 that waits as long as all do loses as much as it gains; one that is sure to come pays."""
    for chance in (0.5, 0.9, 1.0):
        known = waiting_gate().choose(1, [[chance] * 3])
        assert waiting_gate().choose(1, [[chance] * 3], lambda tokens: None) == known
    assert waiting_gate().choose(1, [[1.0] * 3]) == [3]


def test_growth_is_told_of_time_and_of_experts():
    times = StepTimes()
    for _ in range(3):
        times.add(1, 0, Step(1.0, 0.0, 8))
        times.add(1, 3, Step(1.5, 0.0, 20))
    times.add(1, 7, Step(9.0, 0.0, 99))  # once is too few
    assert times.growths() == {"1+3": pytest.approx(1.5)}
    assert times.unions() == {"1+3": pytest.approx(2.5)}


def test_drafts_of_a_batch_go_where_they_are_likeliest():
    gate = SpeculationGate(StepTimes(), 6)
    warm(gate, 3)
    for drafted in range(1, 7):
        for _ in range(3):
            gate.times.add(3, drafted, Step(1 + 0.05 * drafted))
    assert gate.choose(3, [[0.9, 0.9, 0.9], [0.1, 0.9], []]) == [3, 0, 0]
    assert gate.choose(3, [[0.99] * 7, [0.95] * 7, [0.01]])[2] == 0


def test_what_was_accepted_counts_more_than_what_was_promised():
    acceptance = Acceptance()
    assert acceptance.probability("one", 0, 0.9) == pytest.approx(0.9)
    for _ in range(60):
        acceptance.judge("one", 0, 0.9, accepted=False)
    assert acceptance.probability("one", 0, 0.9) < 0.15
    assert acceptance.probability("another", 0, 0.9) == pytest.approx(0.9)
    assert acceptance.probability("one", 1, 0.9) == pytest.approx(0.9)
