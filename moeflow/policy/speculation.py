"""The gate of speculation: how many drafted tokens a step verifies, from what they promise and what rows take.

A step of n sequences and d drafted tokens gives n tokens and those that are accepted. It pays while (n + accepted) a
second is more than n without drafts. More rows touch more experts, so that a step's time grows with d; what it grows by
is measured. Where it is foreseen which experts a draft would wait for, these count: in full in the step's time, and as
far as the token is likely to come in the time of the plain steps that it saves, since they would wait for them too. A
ledger bounds what a wrong guess may cost.

Plain numbers; the caller has the clock. Sources: Leviathan et al. 2023 (expected accepted tokens), Liu et al. 2024,
"SmartSpec" (goodput, and drafts out of a step's budget).
"""

import statistics
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import NamedTuple

from moeflow.policy.step_times import Step, StepTimes

_DECAY = 0.98  # of what was counted of acceptance, with each judged token
_PRIOR_WEIGHT = 4.0  # judged tokens that a source's own probability counts as
_PLACES = 3  # of a draft's tokens that are counted apart; later ones count as the last
_STEPS_OF = 8  # shares into which probabilities are parted

_DRIVEN_OUT = 0.35  # experts that steps will wait for, for each one that came in vain and took a place in memory
_LEAST_GAIN = 0.02  # of the tokens a second

_LEAST_PLAIN = 4  # plain steps before the first draft
_LOAN_STEPS = 3.0  # that the ledger may lose at first, in times of a plain step
_EARNED_SHARE = 0.015  # of a plain step's time that may be lost later
_MOST_SAVED_STEPS = 30.0  # that the ledger holds at most, so that an old gain pays for no long loss
_MIN_REST_STEPS, _MAX_REST_STEPS = 128, 8192  # doubled each time that a trial loses
_WARM_UP_STEPS = 8  # of a rest, at its end
_TURN_STEPS = 192  # with drafts, behind which plain ones are timed again
_PLAIN_TURN_STEPS, _SETTLE_STEPS = 8, 2
_WAITS_SHARE = 0.02  # of a plain step's time, from which experts come and go, and need steps to settle:
_WARM_STEPS, _WARM_SETTLE_STEPS = 24, 16  # plain ones before the first draft, and in a turn


class Acceptance:
    """How often drafted tokens were the chosen ones, by their source, their place and how sure the source was."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Hashable, int, int], tuple[float, float]] = {}  # accepted, judged

    def probability(self, source: Hashable, place: int, promised: float) -> float:
        """Return how likely a token is accepted where those before it are.

        Args:
            source: what drafted it.
            place: in its draft, from 0 on.
            promised: how likely the source says that it is.
        """
        accepted, judged = self._counts.get(_kind(source, place, promised), (0.0, 0.0))
        return (accepted + _PRIOR_WEIGHT * promised) / (judged + _PRIOR_WEIGHT)

    def judge(self, source: Hashable, place: int, promised: float, *, accepted: bool) -> None:
        """Count a token whose forerunners were accepted."""
        kind = _kind(source, place, promised)
        before, judged = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = _DECAY * before + accepted, _DECAY * judged + 1.0


def _kind(source: Hashable, place: int, promised: float) -> tuple[Hashable, int, int]:
    return source, min(place, _PLACES - 1), min(int(promised * _STEPS_OF), _STEPS_OF - 1)


class Gains(NamedTuple):
    """What speculation has brought, in seconds.

    Args:
        gained_s: of steps that gave more than plain ones in their time.
        lost_s: of those that gave less.
    """

    gained_s: float
    lost_s: float


class SpeculationGate:
    """Chooses how many drafted tokens each step verifies, and keeps the ledger of what that brings.

    Every plain step earns a small share of its time. A step with drafts pays what it took beyond the time of plain
    steps for as many tokens, or is paid what it took less. Where the ledger is empty, speculation rests: at first for
    128 plain steps, then for twice as many each time, unless a trial gained. No step may lose more than the ledger
    holds, by what its rows are known to take. So all steps together take about 1.5 % longer at most than plain ones
    would, and three of these once.

    Between steps with drafts, some plain ones are timed in turns, since drafts may have driven out experts that these
    need: what plain steps take is the lower of the two medians.

    Args:
        times: what steps take.
        most: drafted tokens of one step.

    Attributes:
        reason: why the last step had drafts, or none.
        gains: what it has brought.
    """

    def __init__(self, times: StepTimes, most: int) -> None:
        self.times = times
        self.most = most
        self.reason = "starting"
        self.gains = Gains(0.0, 0.0)
        self._saved_s: float | None = None  # of the ledger; None before the loan
        self._rest = _MIN_REST_STEPS  # the next one's length
        self._resting = 0  # plain steps until the next trial
        self._trial_gain_s = 0.0  # since the last rest
        self._speculated = 0  # steps since the last plain turn
        self._turn = 0  # plain steps that are left of one
        self._plain_steps: Counter[int] = Counter()  # by sequences
        self._settled: dict[int, deque[float]] = {}  # by sequences, seconds of plain steps in turns

    @property
    def is_on(self) -> bool:
        """Whether a step may have drafts now."""
        return self._resting == 0

    @property
    def nearly_on(self) -> bool:
        """Whether a step may have drafts now or in a few steps."""
        return self._resting <= _WARM_UP_STEPS

    def wants_drafts(self, num_sequences: int) -> bool:
        """Whether the next step may have drafts, and if not, note why."""
        if self._resting:
            return False
        if self._turn:
            self.reason = "plain steps are timed"
            return False
        if self.plain_s(num_sequences) is None:
            self.reason = "plain steps are timed first"
            return False
        return True

    def plain_s(self, num_sequences: int) -> float | None:
        """Return what a step without drafts takes; None before a few were timed."""
        lately = self.times.measured(num_sequences, 0, _LEAST_PLAIN)
        settled = self._settled.get(num_sequences)
        if self._plain_steps[num_sequences] < _WARM_STEPS and self._waits(num_sequences):
            return None
        if lately is None or not settled:
            return lately
        return min(lately, statistics.median(settled))

    def choose(
        self,
        num_sequences: int,
        chances: list[list[float]],
        waits: Callable[[list[tuple[int, int]]], list[float] | None] | None = None,
    ) -> list[int]:
        """Choose how many tokens of each draft the next step verifies.

        Args:
            num_sequences: n.
            chances: of each sequence, of each of its drafted tokens, the probability that it is accepted where those
                before it are.
            waits: foresees how long tokens wait for experts, where that can be foreseen. Given (sequence, place in its
                draft) of tokens in the order in which a step takes them, it returns the seconds of a step without any,
                then what each token adds for experts that none before it needs; None where it does not know yet.

        Returns:
            [n] numbers of tokens.
        """
        counts = [0] * len(chances)
        plain_s = self.plain_s(num_sequences)
        if plain_s is None or not self.wants_drafts(num_sequences):
            return counts
        tokens = sorted(_reached(chances), reverse=True)[: self.most]
        saved_s = _LOAN_STEPS * plain_s if self._saved_s is None else self._saved_s
        foreseen = waits([(-row, -place) for _, row, place in tokens]) if tokens and waits is not None else None
        measured = foreseen is None  # whether waits are those of the measured steps
        if foreseen is None:
            foreseen = [0.0] * (1 + len(tokens))
        busy_s = plain_s if measured else self.times.of(num_sequences, 0, waits=False) or plain_s
        best, best_ratio = 0, 1 + _LEAST_GAIN
        waited_s, driven_out_s = foreseen[0], 0.0  # what experts that come in vain drive out has to come again
        saved_by_s = plain_now_s = busy_s + waited_s  # of the plain steps in place of which this one comes
        for number, ((reached, _, _), wait_s) in enumerate(zip(tokens, foreseen[1:], strict=True), 1):
            driven_out_s += _DRIVEN_OUT * (1 - reached) * wait_s
            saved_by_s += reached * (busy_s / num_sequences + wait_s)
            waited_s += wait_s
            known_s = self.times.of(num_sequences, number, waits=measured)
            if known_s is None:
                break
            step_s = known_s + waited_s
            if step_s - plain_now_s > saved_s:  # what it loses if no token is accepted
                break
            if saved_by_s / (step_s + driven_out_s) > best_ratio:
                best, best_ratio = number, saved_by_s / (step_s + driven_out_s)
        for _, row, _ in tokens[:best]:
            counts[-row] += 1
        if tokens:
            self.reason = "drafts pay" if best else "no draft would pay"
        return counts

    def finish(self, num_sequences: int, num_drafted: int, num_tokens: int, step: Step) -> float:
        """Take in a step and settle the ledger.

        Args:
            num_sequences: that decoded, nothing else was in the step.
            num_drafted: tokens that it verified.
            num_tokens: that it gave.
            step: what was measured of it; its seconds with those of its drafts.

        Returns:
            Seconds gained; negative where plain steps would have been faster.
        """
        plain_s = self.plain_s(num_sequences)
        step_s = step.seconds
        self.times.add(num_sequences, num_drafted, step)
        if not num_drafted:
            self._finish_plain(num_sequences, step_s)
            return 0.0
        if plain_s is None:
            return 0.0
        gained_s = plain_s * num_tokens / num_sequences - step_s
        gains = self.gains
        self.gains = Gains(gains.gained_s + max(gained_s, 0.0), gains.lost_s + max(-gained_s, 0.0))
        self._trial_gain_s += gained_s
        saved_s = _LOAN_STEPS * plain_s if self._saved_s is None else self._saved_s
        self._saved_s = min(saved_s + gained_s, _MOST_SAVED_STEPS * plain_s)
        self._speculated += 1
        if self._saved_s < 0:
            if self._trial_gain_s > 0:
                self._rest = _MIN_REST_STEPS
            self._resting, self._rest = self._rest, min(2 * self._rest, _MAX_REST_STEPS)
            self._trial_gain_s, self._speculated = 0.0, 0
            self.reason = "slower than plain steps by the clock"
        elif self._speculated >= _TURN_STEPS:
            settle = _WARM_SETTLE_STEPS if self._waits(num_sequences) else _SETTLE_STEPS
            self._speculated, self._turn = 0, _PLAIN_TURN_STEPS + settle
            self._settled.pop(num_sequences, None)
        return gained_s

    def _waits(self, num_sequences: int) -> bool:
        """Whether plain steps wait for experts, as far as is known."""
        whole_s, busy_s = (self.times.measured(num_sequences, 0, waits=waits) for waits in (True, False))
        return whole_s is not None and busy_s is not None and whole_s - busy_s > _WAITS_SHARE * whole_s

    def _finish_plain(self, num_sequences: int, step_s: float) -> None:
        self._plain_steps[num_sequences] += 1
        if self._saved_s is not None:
            self._saved_s += _EARNED_SHARE * step_s
        self._resting = max(0, self._resting - 1)
        if self._turn:
            self._turn -= 1
            if self._turn < _PLAIN_TURN_STEPS:
                self._settled.setdefault(num_sequences, deque(maxlen=_PLAIN_TURN_STEPS)).append(step_s)


def _reached(chances: list[list[float]]) -> list[tuple[float, int, int]]:
    """Return of each drafted token how likely all up to it are accepted, and (negated, to sort) whose and which."""
    tokens = []
    for row, own in enumerate(chances):
        reached = 1.0
        for place, chance in enumerate(own):
            reached *= chance
            tokens.append((reached, -row, -place))
    return tokens
