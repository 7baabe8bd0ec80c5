"""Foreseen waits: how long the tokens of a step would wait for experts that are not in memory.

Each token's likely experts are known from what it took before and from what its sequence took last. Those that are not
in memory have to be brought. What one of them costs is measured, and what each token waits for that nobody foresaw: by
the seconds that steps waited.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from moeflow.engine.regrouping.likely_routes import LikelyRoutes
from moeflow.engine.regrouping.step_groups import PassRoutes
from moeflow.engine.sequence import Piece
from moeflow.policy.step_meter import Experts, StepMeter
from moeflow.policy.step_times import Step

if TYPE_CHECKING:
    from moeflow.offload.route_observer import RouteObserver

_DECAY = 0.98  # of what was foreseen and waited, with each step that was foreseen
_LEAST_STEPS = 4  # before what waits are made of is known
_LEAST_SPREAD = 1e-3  # of what was foreseen, to tell experts from tokens


class RoutedExperts(Experts, Protocol):
    """The experts of a model that are watched: its runtime.

    Attributes:
        experts_per_layer: how many there are.
        observers: what is shown the routes of passes.
    """

    experts_per_layer: list[int]
    observers: "list[RouteObserver]"


class WaitCosts(NamedTuple):
    """What steps waited for, by what was foreseen of them.

    Args:
        seconds_a_miss: of each expert that was foreseen to be missing.
        seconds_a_token: of each token, for experts that nobody foresaw.
    """

    seconds_a_miss: float
    seconds_a_token: float


class ForeseenWaits:
    """Foresees the waits of one engine's steps, and learns from these.

    Args:
        experts: of the model.
        top_k: of a layer's experts, that a token takes.

    Attributes:
        wanted: whether routes of the step under way are of use.
        likely: what tokens took.
    """

    def __init__(self, experts: RoutedExperts, top_k: int) -> None:
        self.wanted = False
        counts = experts.experts_per_layer
        self._experts = experts
        self._shape = len(counts), max(counts)
        self.likely = LikelyRoutes(*self._shape, top_k)
        sizes = experts.cache.sizes
        self._all_units = sum(counts) if sizes is None else sum(map(sum, sizes))
        self._pass_routes = PassRoutes(*self._shape)
        self._drafted: dict[str, tuple[list[int], np.ndarray]] = {}  # of the step under way: tokens and their routes
        self._missing: list[int] | None = None  # of the step under way, by drafted tokens
        self._meter = StepMeter(experts)
        self._num_first = 0  # tokens that it takes in any case
        self._moments = np.zeros((2, 3))  # decayed sums, of (missing, tokens) by (missing, tokens, seconds waited)
        self._num_steps = 0  # in these

    @property
    def costs(self) -> WaitCosts | None:
        """What waits are made of; None before that is known."""
        return None if self._num_steps < _LEAST_STEPS else WaitCosts(*_least_squares(self._moments))

    def begin_step(self, *, routes: bool) -> None:
        """Begin a step.

        Args:
            routes: whether its routes are of use, where experts may be missing at all.
        """
        self.wanted = routes and self._experts.cache.limit < self._all_units
        self._drafted, self._missing = {}, None
        self._meter.begin()

    @contextmanager
    def watching(self, pieces: list[Piece]) -> Iterator[None]:
        """Take in the routes of a pass of the model's own code over pieces."""
        self._experts.observers.append(self._pass_routes)
        try:
            yield
        finally:
            self._experts.observers.remove(self._pass_routes)
            routes = self._pass_routes.take(sum(len(piece.tokens) + len(piece.draft) for piece in pieces))
        self.saw(pieces, routes)

    def saw(self, pieces: list[Piece], routes: np.ndarray) -> None:
        """Take in what the tokens of pieces took, [tokens, L, K]; those of drafts count once they are accepted."""
        begin = 0
        for piece in pieces:
            tokens = [*piece.tokens, *piece.draft]
            own = routes[begin : begin + len(tokens)]
            begin += len(tokens)
            if piece.draft:
                self._drafted[piece.sequence.id] = tokens, own
            else:
                self.likely.observe(piece.sequence.id, tokens, own)

    def accept(self, id: str, num_accepted: int) -> None:
        """Take in how many drafted tokens of a sequence were accepted."""
        if id in self._drafted:
            tokens, routes = self._drafted.pop(id)
            self.likely.observe(id, tokens[: 1 + num_accepted], routes[: 1 + num_accepted])

    def waits(self, tokens: list[tuple[str, int]], num_first: int) -> list[float] | None:
        """Foresee the waits of a step, for experts that are not in memory now.

        Args:
            tokens: a sequence and the token that it is fed, in the order in which the step takes them.
            num_first: how many of them it takes in any case.

        Returns:
            [1 + tokens - num_first] seconds of the first ones, then those that each other token adds; None where it is
            not known yet what waits are made of.
        """
        needed = self.likely.likely([id for id, _ in tokens], [token for _, token in tokens])
        needed &= ~self._experts.cache.present(*self._shape)
        needed[num_first - 1] = needed[:num_first].any(axis=0)
        any_so_far = np.logical_or.accumulate(needed[num_first - 1 :], axis=0)
        self._missing, self._num_first = any_so_far.sum(axis=(1, 2)).tolist(), num_first
        costs = self.costs
        if costs is None:
            return None
        added = np.diff(self._missing, prepend=0)
        seconds = costs.seconds_a_miss * added + costs.seconds_a_token
        seconds[0] += costs.seconds_a_token * (num_first - 1)
        return seconds.tolist()

    def finish_step(self, num_drafted: int, step_s: float) -> Step:
        """Take in how many drafted tokens the step verified, and its seconds; return what was measured of it."""
        step, waited_s = self._meter.finish(step_s), self._meter.waited_s
        if self._missing is not None and waited_s is not None:
            known = np.array([self._missing[num_drafted], self._num_first + num_drafted])
            self._moments *= _DECAY
            self._moments += np.outer(known, [*known, waited_s])
            self._num_steps += 1
        return step

    def forget(self, id: str) -> None:
        """Drop a sequence that has ended; what its tokens took stays known."""
        self.likely.forget(id)
        self._drafted.pop(id, None)


def _least_squares(moments: np.ndarray) -> tuple[float, float]:
    """Return seconds of a missing expert and of a token that explain the seconds waited best, none below zero."""
    (miss_miss, miss_token, miss_s), (_, token_token, token_s) = moments.tolist()
    both = miss_miss * token_token - miss_token**2
    if both > _LEAST_SPREAD * miss_miss * token_token:
        a_miss = (miss_s * token_token - token_s * miss_token) / both
        a_token = (token_s * miss_miss - miss_s * miss_token) / both
        if a_miss >= 0 and a_token >= 0:
            return a_miss, a_token
        if a_token >= 0:
            return 0.0, token_s / token_token
    return (miss_s / miss_miss, 0.0) if miss_miss else (0.0, token_s / token_token)
