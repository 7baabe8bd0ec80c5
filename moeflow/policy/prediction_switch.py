"""Switches prediction on and off, step by step: off where nothing is missed, else by the clock.

Only the time of whole steps counts. The ledger of prefetch leaves out its cost to the arithmetic: on a CPU the reads
take cores, caches and bandwidth from it. Plain numbers; the caller has the clock.
"""

import statistics

_BLOCK_STEPS = 12  # measured in one mode before the other
_SETTLE_STEPS = 3  # after a change of mode, not measured: the cache still holds the other mode's choices
_MIN_HOLD_STEPS, _MAX_HOLD_STEPS = 192, 6144  # between two trials, doubled each time the same mode wins
_MIN_GAIN_SHARE = 0.02  # of a step's time; a smaller gain is no reason to predict
_NOTHING_MISSED, _ALL_FITS = "nothing is missed", "every expert has room"
_QUIET_STEPS = 8  # without a miss, after which there is nothing to save


class PredictionSwitch:
    """Chooses a mode for each decode step from what the steps before it took.

    Modes are compared by the median of their steps' times, each in one block of a trial. Of about two hundred
    steps a trial takes fifteen into the other mode, and ever less while the trials agree.
    """

    def __init__(self) -> None:
        self.on = True
        self.reason = "starting"
        self.num_trials = 0
        self._hold = _MIN_HOLD_STEPS
        self._steps_left = 2 * _BLOCK_STEPS  # of the present phase
        self._trial: dict[bool, float] | None = {}  # median step of the modes tried so far; None between trials
        self._times: list[float] = []
        self._settle = _SETTLE_STEPS
        self._quiet = 0

    def step(self, step_s: float | None, num_misses: int, saved_s: float) -> bool:
        """Choose for the step that begins.

        Args:
            step_s: seconds of the last step; None where there is none to compare (the first, or after a prefill).
            num_misses: experts the last step had to wait for, late prefetches included.
            saved_s: seconds that prefetch saved less those it cost in the last step, by its ledger.

        Returns:
            Whether to predict.
        """
        self._quiet = 0 if num_misses or saved_s > 0 else self._quiet + 1
        if self._quiet >= _QUIET_STEPS:
            return self._off(_NOTHING_MISSED)
        if self.reason in (_NOTHING_MISSED, _ALL_FITS):
            self._choose(True, "misses have begun")
        if step_s is None:
            return self.on
        if self._settle:
            self._settle -= 1
            return self.on
        self._times.append(step_s)
        self._steps_left -= 1
        if self._steps_left <= 0:
            self._next_phase()
        return self.on

    def rest(self) -> bool:
        """Choose for a step while every expert has room: a step that predicts costs more than each one's first use.

        Returns:
            Whether to predict: False.
        """
        return self._off(_ALL_FITS)

    def _off(self, reason: str) -> bool:
        self._choose(False, reason)
        self._trial, self._steps_left, self._times = {}, 2 * _BLOCK_STEPS, []
        return self.on

    def _next_phase(self) -> None:
        if self._trial is None:  # the hold is over: begin a trial with the mode that runs
            self._trial, self._steps_left, self._times = {}, _BLOCK_STEPS, []
            return
        self._trial[self.on] = statistics.median(self._times)
        if len(self._trial) < 2:
            self._choose(not self.on, "trial")
            self._steps_left = _BLOCK_STEPS
            return
        self.num_trials += 1
        better = self._trial[True] < (1 - _MIN_GAIN_SHARE) * self._trial[False]
        same = better == (not self.on)  # the mode that was on before this trial is the other one
        self._hold = min(2 * self._hold, _MAX_HOLD_STEPS) if same else _MIN_HOLD_STEPS
        self._choose(better, "faster by trial" if better else "slower by trial")
        self._trial, self._steps_left = None, self._hold

    def _choose(self, on: bool, reason: str) -> None:
        if on != self.on:
            self._settle, self._times = _SETTLE_STEPS, []
        self.on, self.reason = on, reason
