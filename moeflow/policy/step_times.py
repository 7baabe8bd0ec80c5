"""What steps take by their sequences and drafted tokens: measured lately, or reckoned from those that were.

Plain numbers.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

_MOST_TIMES = 15  # of each number of rows, of which the median counts
_LEAST_TIMES = 2
_OLD_STEPS = 1024  # a number of rows that was not tried for so long is not known any more
_EXPERTS_SHARE = 0.5  # of a step's time, before there are measurements


def union_share(num_rows: int, num_experts: int, top_k: int) -> float:
    """Return the share of a layer's experts that rows touch, if each row chose as any other and apart from them."""
    return 1.0 - (1.0 - top_k / num_experts) ** num_rows


class Step(NamedTuple):
    """What was measured of a step.

    Args:
        seconds: that it took.
        waited_s: of these, waiting for experts.
        num_experts: (layer, expert) pairs that its rows touched.
    """

    seconds: float
    waited_s: float = 0.0
    num_experts: int = 0


class StepTimes:
    """What steps of some sequences and drafted tokens take.

    Args:
        num_experts: of a layer; None where the model has none that count.
        top_k: of these, that a token takes.
    """

    def __init__(self, num_experts: int | None = None, top_k: int = 1) -> None:
        self._num_experts, self._top_k = num_experts, top_k
        self._steps: dict[tuple[int, int], deque[Step]] = {}
        self._tried: dict[tuple[int, int], int] = {}
        self._now = 0

    def add(self, num_sequences: int, num_drafted: int, step: Step) -> None:
        """Take in a step."""
        key = num_sequences, num_drafted
        self._now += 1
        if self._now - self._tried.get(key, self._now) > _OLD_STEPS:
            self._steps.pop(key, None)
        self._steps.setdefault(key, deque(maxlen=_MOST_TIMES)).append(step)
        self._tried[key] = self._now

    def measured(
        self, num_sequences: int, num_drafted: int, least: int = _LEAST_TIMES, *, waits: bool = True
    ) -> float | None:
        """Return the median of steps like this, with or without their waits; None where too few were seen lately."""
        key = num_sequences, num_drafted
        steps = self._steps.get(key, ())
        if len(steps) < least or self._now - self._tried[key] > _OLD_STEPS:
            return None
        return statistics.median(step.seconds - step.waited_s * (not waits) for step in steps)

    def of(self, num_sequences: int, num_drafted: int, *, waits: bool = True) -> float | None:
        """Return what such a step takes: measured, or from the nearest measured one and how many more experts it needs.

        Args:
            num_sequences: n.
            num_drafted: d.
            waits: whether waiting for experts is a part of it.

        Returns:
            Seconds; None where no step of so many sequences was measured.
        """
        for fewer in range(num_drafted, -1, -1):
            known = self.measured(num_sequences, fewer, waits=waits)
            if known is not None:
                growth = self._growth(num_sequences + num_drafted) / self._growth(num_sequences + fewer)
                return known * growth
        return None

    def growths(self) -> dict[str, float]:
        """Return what drafted tokens made of steps' times, as "sequences+drafted": times that of a plain step."""
        return self._growths(lambda steps: statistics.median(step.seconds for step in steps))

    def unions(self) -> dict[str, float]:
        """Return what drafted tokens made of the experts that a step touches, likewise: times those of a plain step."""
        return self._growths(lambda steps: statistics.fmean(step.num_experts for step in steps))

    def _growths(self, value: Callable[[Iterable[Step]], float]) -> dict[str, float]:
        found = {}
        for number, drafted in sorted(self._steps):
            own, plain = ((number, rows) for rows in (drafted, 0))
            known = [self.measured(*key) is not None for key in (own, plain)]
            if drafted and all(known) and (base := value(self._steps[plain])):
                found[f"{number}+{drafted}"] = value(self._steps[own]) / base
        return found

    def _growth(self, num_rows: int) -> float:
        """Return what a step of rows takes, in times of one row, before it was measured."""
        union = float(num_rows)
        if self._num_experts is not None:
            union = union_share(num_rows, self._num_experts, self._top_k) * self._num_experts / self._top_k
        return 1.0 + _EXPERTS_SHARE * (union - 1.0)
