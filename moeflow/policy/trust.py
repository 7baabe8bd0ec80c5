"""Decides for each decode step on a GPU whether to trust that no expert is missed.

A trusted step asks the host for nothing; one that missed an expert is run again. Plain numbers; the caller has the
clock.
"""

_NEWEST = 0.1  # weight of the last step in the averages
_FIRST_SHARE = 0.75  # of steps without a miss, from which the first step is trusted
_STEPS_BEFORE = 8  # seen before the first


class Trust:
    """The share of steps that miss nothing, and the time of steps of both kinds.

    Attributes:
        steps: trusted steps, by whether they were right.
        is_possible: whether every layer can run without asking.
    """

    def __init__(self) -> None:
        self.steps = {True: 0, False: 0}
        self.is_possible = True
        self._share = 0.0
        self._num_seen = 0
        self._asking_s: float | None = None
        self._trusted_s: float | None = None

    @property
    def pays(self) -> bool:
        """Whether the next step is to be trusted: its time, and that of its repetition, below that of one that asks."""
        if not self.is_possible or self._num_seen < _STEPS_BEFORE:
            return False
        if self._trusted_s is None or self._asking_s is None:
            return self._share >= _FIRST_SHARE
        return self._trusted_s + (1 - self._share) * self._asking_s < self._asking_s

    def asked(self, missed: bool, seconds: float) -> None:
        """Take in a step that asked for every expert, whether it missed one, and its seconds."""
        self._see(missed)
        self._asking_s = _average(self._asking_s, seconds)

    def trusted(self, missed: bool, seconds: float) -> None:
        """Take in a trusted step, whether it missed an expert, and its seconds without the repetition."""
        self.steps[not missed] += 1
        self._see(missed)
        self._trusted_s = _average(self._trusted_s, seconds)

    def _see(self, missed: bool) -> None:
        self._num_seen += 1
        weight = max(_NEWEST, 1 / self._num_seen)
        self._share += weight * ((not missed) - self._share)


def _average(before: float | None, now: float) -> float:
    return now if before is None else before + _NEWEST * (now - before)
