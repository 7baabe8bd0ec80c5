"""Token scheduler: splits sequences that decode into passes that activate few experts.

Groups are planned by the routes that each sequence is likely to take (`likely_routes`). Most of a plan is made beside
the last pass of the step before, without the tokens which that pass has yet to choose; once they are known the plan is
amended. After a step the true routes are known, and with them what groups by arrival would have activated: so the
scheduler knows its gain exactly, and stands aside where that is not worth the waiting for plans, to look again ever
more rarely.

Knows routes and ids. Knows nothing of tensors, models or slots.

Source: the token scheduler of ExpertFlow (arXiv 2410.17954, section 4.2).
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeflow.engine.regrouping.likely_routes import LikelyRoutes
from moeflow.engine.regrouping.search import active_pairs, amended_groups, arrival_groups, regroup
from moeflow.errors import ConfigError
from moeflow.fork import tell_of_forks
from moeflow.predictors.odds import multi_hot

_TRIAL_STEPS = 8  # planned steps between two judgements
_MIN_REST_STEPS, _MAX_REST_STEPS = 32, 1024  # without planning, after a trial that did not pay
_WARM_UP_STEPS = 8  # of a rest, at its end, in which routes are observed again


@dataclass
class SchedulerStats:
    """Counters of regrouping.

    Args:
        steps: steps of several groups.
        planned: of these, those grouped by likely routes.
        active: (layer, expert) pairs activated, summed over groups, in the planned steps.
        active_by_arrival: the same if groups had been in the order of arrival.
        plan_s: seconds of planning.
        waited_s: of these, seconds that a step had to wait for.
    """

    steps: int = 0
    planned: int = 0
    active: int = 0
    active_by_arrival: int = 0
    plan_s: float = 0.0
    waited_s: float = 0.0


class TokenScheduler:
    """Splits the sequences of a step into groups.

    Args:
        num_layers: L, MoE layers.
        num_experts: E, the largest number of experts in a layer.
        top_k: K.
        group_size: most sequences in a pass.
        regrouping: whether to plan at all; else groups are in the order of arrival.
    """

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, group_size: int, *, regrouping: bool = True
    ) -> None:
        if type(group_size) is not int or group_size < 1:
            raise ConfigError(f"group_size={group_size!r} is not allowed: give a whole number, at least 1.")
        self.group_size = group_size
        self.stats = SchedulerStats()
        self._regrouping = regrouping
        self._shape = num_layers, num_experts
        self._likely = LikelyRoutes(num_layers, num_experts, top_k)
        self._begin_thread()
        tell_of_forks(self)
        self._split: tuple[list[str], np.ndarray] | None = None  # the step under way, if it was planned
        self._rest, self._next_rest = 0, _MIN_REST_STEPS
        self._trial = [0, 0, 0.0, 0.0]  # steps, pairs saved, seconds waited, seconds of steps

    def after_fork(self) -> None:
        """Begin anew in the child of a fork, with a thread that will be there and without the plan under way."""
        self._begin_thread()

    def _begin_thread(self) -> None:
        self._threads = ThreadPoolExecutor(1, "moeflow-scheduler")  # its thread comes with the first plan
        self._ahead: tuple[list[str], Future] | None = None  # of these sequences, [sequences] groups

    @property
    def wants_routes(self) -> bool:
        """Whether routes that are observed in this step will be of use: not while a long rest has just begun."""
        return self._regrouping and self._rest <= _WARM_UP_STEPS

    def split(self, sequences: list[str], tokens: list[int], resident: np.ndarray | None = None) -> list[list[int]]:
        """Split a step's sequences into as few groups as there can be, of sizes that differ by one at most.

        Args:
            sequences: ids, in the order of arrival.
            tokens: the token that each is fed.
            resident: [L, E] bool, what lies in memory; groups that need it come first. None where not known.

        Returns:
            Places in `sequences`, a list for each group, in the order to run them.
        """
        num_groups = -(-len(sequences) // self.group_size)
        self._split = None
        if num_groups <= 1:
            return [list(range(len(sequences)))] if sequences else []
        self.stats.steps += 1
        groups = arrival_groups(len(sequences), num_groups)
        if self._regrouping and self._due():
            begin = time.perf_counter()
            likely = self._likely.likely(sequences, tokens)
            groups = self._planned(sequences, likely, num_groups)
            order = _order(likely, groups, num_groups, resident)
            self.stats.planned += 1
            self._waited(time.perf_counter() - begin)
            self._split = sequences, groups
        else:
            order = list(range(num_groups))
        return [np.flatnonzero(groups == group).tolist() for group in order]

    def plan_ahead(self, sequences: list[str], tokens: Sequence[int | None]) -> None:
        """Begin to plan the next step beside what computes now.

        Args:
            sequences: ids of those that are likely to go on.
            tokens: the token that each will be fed; None where it is not chosen yet.
        """
        num_groups = -(-len(sequences) // self.group_size)
        if self._regrouping and num_groups > 1 and self._rest == 0:
            begin = time.perf_counter()
            likely = self._likely.likely(sequences, tokens)
            self._ahead = sequences, self._threads.submit(self._plan, likely, num_groups)
            self._waited(time.perf_counter() - begin)

    def observe(self, sequence: str, tokens: list[int], chosen: np.ndarray) -> None:
        """Take in what a sequence's tokens took: [tokens, L, K] ids of experts, E or more for none."""
        self._likely.observe(sequence, tokens, chosen)

    def forget(self, sequence: str) -> None:
        """Drop a sequence that has ended."""
        self._likely.forget(sequence)

    def finish(self, chosen: np.ndarray, step_s: float) -> None:
        """Judge the step that `split` began.

        Args:
            chosen: [sequences, L, K], the true routes, in the order that `split` was given.
            step_s: seconds that the step took.
        """
        if self._split is None:
            return
        sequences, groups = self._split
        assert len(chosen) == len(sequences), "routes of another step"
        routes = multi_hot(chosen, self._shape[1]) > 0
        active = active_pairs(routes, groups)
        arrival = active_pairs(routes, arrival_groups(len(sequences), int(groups.max()) + 1))
        self.stats.active += active
        self.stats.active_by_arrival += arrival
        self._trial[0] += 1
        self._trial[1] += arrival - active
        self._trial[3] += step_s
        self._split = None
        if self._trial[0] == _TRIAL_STEPS:
            self._judge(active)

    def close(self) -> None:
        """End the thread that plans."""
        self._threads.shutdown(cancel_futures=True)

    def _due(self) -> bool:
        self._rest = max(self._rest - 1, 0)
        return self._rest == 0

    def _waited(self, seconds: float) -> None:
        self.stats.waited_s += seconds
        self._trial[2] += seconds

    def _judge(self, active: int) -> None:
        """Rest where what was saved, at most a pair's part of the step each, is not worth the waiting for plans."""
        steps, saved, waited_s, step_s = self._trial
        worth_s = saved * step_s / max(steps * active, 1)
        if worth_s <= waited_s:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _MAX_REST_STEPS)
        else:
            self._next_rest = _MIN_REST_STEPS
        self._trial = [0, 0, 0.0, 0.0]

    def _planned(self, sequences: list[str], likely: np.ndarray, num_groups: int) -> np.ndarray:
        """Return the plan made ahead, amended; where there is none, one made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._plan(likely, num_groups)
        planned = ahead[1].result()
        begin = time.perf_counter()
        start = carried_groups(dict(zip(ahead[0], planned.tolist(), strict=True)), sequences, num_groups)
        groups = amended_groups(likely, num_groups, start)
        self.stats.plan_s += time.perf_counter() - begin
        return groups

    def _plan(self, likely: np.ndarray, num_groups: int) -> np.ndarray:
        begin = time.perf_counter()
        groups = regroup(likely, num_groups)
        self.stats.plan_s += time.perf_counter() - begin
        return groups


def carried_groups(planned: dict[str, int], sequences: list[str], num_groups: int) -> np.ndarray:
    """Return [sequences] groups of the usual sizes: the planned ones where there is room, else whatever has most.

    Args:
        planned: the group of each sequence that was planned for.
        sequences: those that are there now.
        num_groups: how many groups there are now.
    """
    room = np.bincount(arrival_groups(len(sequences), num_groups), minlength=num_groups)
    groups = np.full(len(sequences), -1, np.int32)
    for place, sequence in enumerate(sequences):
        group = planned.get(sequence, num_groups)
        if group < num_groups and room[group]:
            groups[place] = group
            room[group] -= 1
    for place in np.flatnonzero(groups < 0).tolist():
        groups[place] = room.argmax()
        room[groups[place]] -= 1
    return groups


def _order(likely: np.ndarray, groups: np.ndarray, num_groups: int, resident: np.ndarray | None) -> list[int]:
    """Order groups by need: first the one that shares most with memory, then with the group before it."""
    needs = np.stack([likely[groups == group].any(axis=0) for group in range(num_groups)])
    left, there = list(range(num_groups)), resident
    order: list[int] = []
    while left:
        best = left[0] if there is None else max(left, key=lambda group: (int((needs[group] & there).sum()), -group))
        left.remove(best)
        order.append(best)
        there = needs[best]
    return order
