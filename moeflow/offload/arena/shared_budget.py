"""One budget of experts and of the keys and values of engines: `load_moe(memory=)`, in host memory.

Experts take what keys and values leave, down to the fewest that a token needs. Keys and values come first: before they
are allocated, experts leave and their pages go back to the system. When they are released, experts come again, in
steps. Knows bytes and slots. Knows nothing of sequences or of which expert sits where.
"""

import weakref
from typing import TYPE_CHECKING

from moeflow.offload.arena.governor import Governor
from moeflow.policy.marginal_worth import expert_worth

if TYPE_CHECKING:
    from moeflow.offload.runtime import ExpertRuntime

_STEPS = 64  # in which all experts come back; fewer at a time would come and go with every conversation
_ASKS_PER_MEASUREMENT = 32  # of the time that experts are waited for


class SharedBudget(Governor):
    """Limits the cache by the bytes that keys and values leave.

    Args:
        total_bytes: of both together.
        unit_bytes: of one unit of the cache's limit.
        min_units: never fewer.
        max_units: never more: all experts, or what the budget buys.

    Attributes:
        peak_bytes: the most that both had at once.
    """

    def __init__(self, total_bytes: int, unit_bytes: int, min_units: int, max_units: int) -> None:
        self.total_bytes = total_bytes
        self.peak_bytes = 0
        self.unit_bytes = unit_bytes
        self._min_units, self._max_units = min_units, max_units
        self._step = -(-max_units // _STEPS)
        self._shares: tuple[weakref.ref[KeyValueShare], ...] = ()  # replaced as a whole: threads may be going over it

    @property
    def key_value_bytes(self) -> int:
        """Bytes that keys and values have, of all engines."""
        return sum(share.num_bytes for share in (behind() for behind in self._shares) if share is not None)

    @property
    def most_key_value_bytes(self) -> int:
        """Bytes that keys and values may have beside the fewest experts."""
        return self.total_bytes - self._min_units * self.unit_bytes

    @property
    def target(self) -> int:
        """The limit beside the keys and values that there are."""
        return min(self._max_units, (self.total_bytes - self.key_value_bytes) // self.unit_bytes)

    def slots(self, used: int, limit: int, *, now: bool = False) -> int:
        """Return the limit from here on: lower at once, higher in steps.

        Args:
            used: units in use.
            limit: the present limit.
            now: means nothing here.
        """
        self.note(used)
        target = self.target
        return limit if limit < target < min(limit + self._step, self._max_units) else target

    def share(self, runtime: "ExpertRuntime") -> "KeyValueShare":
        """Return the share of another engine's keys and values; it ends when nobody holds it.

        Args:
            runtime: whose experts make room.
        """
        share = KeyValueShare(self, runtime)
        self._shares = (*(one for one in self._shares if one() is not None), weakref.ref(share))
        return share

    def note(self, used: int) -> None:
        """Note that experts use so many units now."""
        self.peak_bytes = max(self.peak_bytes, used * self.unit_bytes + self.key_value_bytes)

    def stats(self) -> dict[str, int]:
        return {
            "shared_budget_bytes": self.total_bytes,
            "shared_peak_bytes": self.peak_bytes,
            "key_value_bytes": self.key_value_bytes,
        }


class KeyValueShare:
    """What one engine's keys and values have of a shared budget. One thread at a time uses it.

    Args:
        budget: that it is a share of.
        runtime: whose experts make room.

    Attributes:
        num_bytes: that it has.
    """

    def __init__(self, budget: SharedBudget, runtime: "ExpertRuntime") -> None:
        self.budget = budget
        self.num_bytes = 0
        self._runtime = runtime
        self._asks = 0
        self._stalls = 0.0, 0.0  # seconds of decode steps, and of waiting in them, at the last measurement
        self._worth = 0.0

    @property
    def most_bytes(self) -> int:
        """Bytes that it may have beside what other engines have."""
        return max(0, self.budget.most_key_value_bytes - (self.budget.key_value_bytes - self.num_bytes))

    def hold(self, num_bytes: int) -> bool:
        """Have so many bytes from now on, and return whether it can; if not, all stays as it was.

        For more, experts leave before this returns. Fewer are given back at once.

        Raises:
            ClosedModelError: the model was closed.
        """
        before = self.num_bytes
        if num_bytes <= before:
            self.num_bytes = num_bytes
            return True
        with self._runtime.changing() as residency:  # under the one lock, so that two engines cannot take the same
            if num_bytes > self.most_bytes:
                return False
            self.budget.note(residency.cache.used)
            self.num_bytes = num_bytes
            cache, limit = residency.cache, self.budget.target
            try:
                if limit < cache.limit:
                    residency.set_limit(limit)
                if cache.used > limit:  # slots of copies under way: they can be evicted once these have ended
                    residency.settle_all()
                    residency.set_limit(limit)
            except BaseException:
                self.num_bytes = before
                raise
            self.budget.note(cache.used)
        return True

    def expert_worth(self) -> float:
        """Return what a byte more of experts saves, in seconds a second, measured from time to time."""
        if self._asks % _ASKS_PER_MEASUREMENT == 0:
            now, (timed_s, stall_s) = self._runtime.snapshot(), self._stalls
            self._stalls = now.decode.timed_s, now.decode.stall_s
            passed_s = now.decode.timed_s - timed_s
            if passed_s > 0:
                stall_share = min(1.0, max(0.0, now.decode.stall_s - stall_s) / passed_s)
                absent_bytes = now.memory["all_experts_bytes"] - now.memory["device_bytes"]
                self._worth = expert_worth(stall_share, absent_bytes)
        self._asks += 1
        return self._worth
