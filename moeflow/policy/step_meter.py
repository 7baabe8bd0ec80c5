"""Measures a step: its seconds, what it waited for experts, and how many of them it asked for."""

from typing import TYPE_CHECKING, Protocol

from moeflow.policy.step_times import Step

if TYPE_CHECKING:
    from moeflow.policy.cache import ExpertCache


class Demanded(Protocol):
    """What counts demands."""

    def demanded(self) -> tuple[int, float]:
        """Return demanded experts until now, and seconds that were waited for any."""
        ...


class Experts(Protocol):
    """The experts of a model: its runtime.

    Attributes:
        cache: which of them are in memory.
        expert_fetch: counts demands.
    """

    cache: "ExpertCache"

    @property
    def expert_fetch(self) -> Demanded:
        """What counts demands."""
        ...


class StepMeter:
    """Measures the steps of one model, one after the other.

    Args:
        experts: of the model.

    Attributes:
        waited_s: what the last step waited for experts, those for free room too; None where that is not known.
    """

    def __init__(self, experts: Experts) -> None:
        self.waited_s: float | None = None
        self._experts = experts
        self._before = 0, 0.0  # what had been demanded, and waited, when the step began
        self._evictions = 0  # likewise

    def begin(self) -> None:
        """Begin a step."""
        self._before = self._experts.expert_fetch.demanded()
        self._evictions = self._experts.cache.evictions

    def finish(self, step_s: float) -> Step:
        """Return what was measured of a step that took these seconds.

        Where experts came and none left for them, memory fills: they would have come sooner or later in any case, and
        once. What the step waited for them is left out.
        """
        experts, waited_s = self._experts.expert_fetch.demanded()
        before_experts, before_s = self._before
        if experts < before_experts:  # the counters were reset
            self.waited_s = None
            return Step(step_s)
        self.waited_s = waited_s = waited_s - before_s
        if self._experts.cache.evictions == self._evictions:
            step_s, waited_s = step_s - waited_s, 0.0
        return Step(step_s, waited_s, experts - before_experts)
