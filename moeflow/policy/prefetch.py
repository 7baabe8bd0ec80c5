"""From predictions to prefetches: which absent expert is copied next, and which may be evicted for it.

Owns the forecast by which the cache evicts, and the ledger of prefetch. Knows the predictor's protocol and the cache's.
Knows nothing of tensors, files, streams or clocks, so that the replay drives this very code.
"""

from typing import Any

import numpy as np

from moeflow.core import ExpertKey
from moeflow.errors import PredictorError
from moeflow.policy.cache import ExpertCache
from moeflow.policy.demand import Demand
from moeflow.policy.forecast import Forecast
from moeflow.policy.prefetch_ledger import PrefetchLedger
from moeflow.predictors.protocol import Predictor

# A wrong prefetch delays a concurrent miss by half a copy on average, so the threshold rises with the miss rate.
_MIN_THRESHOLD, _MAX_THRESHOLD = 0.15, 0.5  # probability
_LAYER_WEIGHT = 0.01  # of one layer in the moving average of misses


class Prefetcher:
    """Keeps the forecast of one model and hands out experts to prefetch, the most urgent first.

    Args:
        predictor: gives the probabilities.
        cache: of the experts; its `forecast` is kept up to date.
        ledger: takes the outcome of every prefetch.
        window: layers ahead within which an expert may be fetched; a whole step when None.
        min_probability: below it an expert is not fetched; by the recent miss rate when None.
        num_steps: how many steps ahead evictions bet.
        num_layers: of the cache; those behind the predictor's are not prefetched. As many as it has when None.
    """

    def __init__(
        self,
        predictor: Predictor,
        cache: ExpertCache,
        ledger: PrefetchLedger,
        *,
        window: int | None = None,
        min_probability: float | None = None,
        num_steps: int = 4,
        num_layers: int | None = None,
    ) -> None:
        self.predictor = predictor
        self.ledger = ledger
        self.active = False  # whether the step under way is predicted
        self._cache = cache
        self._forecast = Forecast(num_layers or predictor.num_layers, predictor.num_experts, num_steps)
        self._window = min(window or predictor.num_layers, predictor.num_layers)
        self._min_probability = min_probability
        self._miss_rate = _MAX_THRESHOLD  # misses a layer, late arrivals included
        self._next_step = np.zeros((predictor.num_layers, predictor.num_experts), np.float32)
        self._next_step_known = False
        self._queue: list[tuple[ExpertKey, int]] = []
        self._planned = True  # whether the queue follows from the latest prediction

    @property
    def everything_fits(self) -> bool:
        """Whether every expert has room, so that each is missed once at most."""
        return self._cache.has_room_for(self.predictor.num_layers * self.predictor.num_experts)

    def begin(self, num_sequences: int) -> None:
        """Begin new sequences. Predictions that need only `observe` start here."""
        self.predictor.begin(num_sequences)
        self._queue = []
        self._begin_forecast(None, None)

    def rest(self) -> None:
        """Stop predicting until the next `begin_step`: the cache evicts by its own counts."""
        self.active, self._queue, self._planned = False, [], True
        self._cache.forecast = None

    def begin_step(self, token_ids: np.ndarray) -> None:
        """Predict the step that feeds token_ids: [B].

        Raises:
            PredictorError: the predictor answered with something that is not a probability.
        """
        self.active = True
        self.ledger.decay()
        now = _any_of(self.predictor.step(token_ids), self.predictor)
        later = _any_of(self.predictor.later(), self.predictor)
        self._begin_forecast(now, later)
        self._planned = False

    def record_demand(self, demand: Demand) -> None:
        """Enter a layer's demand. An expert fetched for it in vain loses this step's worth and keeps the next steps'.

        To evict it whatever the next steps say costs 1 % of the speed on the gpt-oss trace.
        """
        self._miss_rate += _LAYER_WEIGHT * (len(demand.absent) + len(demand.in_flight) - self._miss_rate)
        self.ledger.record_demand(demand)
        self._forecast.pass_layer(demand.layer)

    def observe(self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: Any) -> None:
        """Show the predictor a layer's routes, experts and weights [B, K], and plan anew.

        Raises:
            PredictorError: the predictor answered with something that is not a probability.
        """
        refined = _any_of(self.predictor.observe(layer, experts, weights, signal), self.predictor)
        if refined is not None:
            self._forecast.refine(layer + 1, refined)
        self._planned = False

    def take(self) -> tuple[ExpertKey, int] | None:
        """Reserve a slot for the most urgent absent expert that is worth one; return the expert and its slot."""
        if not self._planned:
            self._plan()
        while self._queue:
            key, distance = self._queue.pop()
            if key in self._cache.slots:
                continue
            slot = self._cache.reserve(key, worth=self._forecast.worth[key])
            if slot is not None:
                self.ledger.start(key, distance, self._cache.evicted)
                return key, slot
            for gone in self._cache.evicted:
                self.ledger.evict(gone)
        return None

    def overdue(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        """Return the prefetches of these that come too late: their layer has passed, or passes now."""
        layer, window = self._forecast.layer, self._window
        num_layers = self.predictor.num_layers
        return [key for key in keys if (key.layer - layer - 1) % num_layers >= window or key.layer == layer]

    def _begin_forecast(self, now: np.ndarray | None, later: np.ndarray | None) -> None:
        shape = self._forecast.num_layers, self._forecast.num_experts
        self._forecast.begin_step(now, later, self._cache.usual_rate(*shape))
        self._next_step_known = later is not None
        if later is not None:
            self._next_step[:] = later[0]
        self._cache.forecast = self._forecast

    def _plan(self) -> None:
        """Queue the absent experts of the window that are likely enough, near and likely ones first."""
        self._planned = True
        threshold = self._min_probability
        if threshold is None:
            threshold = min(max(self._miss_rate, _MIN_THRESHOLD), _MAX_THRESHOLD)
        forecast, first = self._forecast, self._forecast.layer + 1
        num_layers, last = self.predictor.num_layers, self._forecast.layer + 1 + self._window
        present = self._cache.present(num_layers, forecast.num_experts)
        now = forecast.now[:num_layers]
        self._queue = self._wanted(now[first:last], present[first:last], first, 1, threshold)
        if last > num_layers and self._next_step_known:
            wrap = slice(0, min(last - num_layers, first))
            distance = 1 + num_layers - first
            self._queue = self._wanted(self._next_step[wrap], present[wrap], 0, distance, threshold) + self._queue

    def _wanted(
        self, probability: np.ndarray, present: np.ndarray, first_layer: int, distance: int, threshold: float
    ) -> list[tuple[ExpertKey, int]]:
        """List (expert, distance) of some layers' absent and likely experts, the most urgent last."""
        rows, experts = ((probability >= threshold) & ~present).nonzero()
        if not len(rows):
            return []
        # By probability and distance together: the nearest may be unlikely, and the likeliest can wait.
        order = np.argsort(probability[rows, experts] / np.sqrt(rows + distance), kind="stable")
        allowed = self.ledger.allowed
        return [
            (ExpertKey(first_layer + row, expert), distance + row)
            for row, expert in zip(rows[order].tolist(), experts[order].tolist(), strict=True)
            if allowed(first_layer + row, distance + row)
        ]


def _any_of(probabilities: np.ndarray | None, predictor: Predictor) -> np.ndarray | None:
    """Turn probabilities of B sequences into the probability that any of them demands: [B, ...] -> [...]."""
    if probabilities is None:
        return None
    highest, lowest = probabilities.max(), probabilities.min()
    if highest != highest:  # NaN somewhere, which is allowed, or everywhere
        highest, lowest = np.fmax.reduce(probabilities, axis=None), np.fmin.reduce(probabilities, axis=None)
    if not (lowest >= 0 and highest <= 1.0001):
        raise PredictorError(
            f"predictor {predictor.name!r} answered with probabilities from {lowest} to {highest}; allowed are 0 to 1."
        )
    if len(probabilities) == 1:
        return probabilities[0]
    return 1 - np.prod(1 - probabilities, axis=0)
