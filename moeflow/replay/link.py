"""Replay with a link and a clock: the cost of a trace's decode steps on a machine.

The cache and the prefetcher are the live runtime's own; only the copies are simulated, and take time. One link runs one
copy after another, demanded ones before prefetches.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moeflow.core import ExpertKey
from moeflow.errors import BudgetError, ConfigError
from moeflow.policy.cache import ExpertCache
from moeflow.policy.demand import Demand
from moeflow.policy.prediction_switch import PredictionSwitch
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger
from moeflow.predictors.protocol import Predictor
from moeflow.trace.format import DECODE
from moeflow.trace.trace import RoutingTrace

STEPS_AHEAD = 4  # over which evictions compare predicted uses


class LinkModel(NamedTuple):
    """The machine of a replay: one link, and one time for every layer.

    Args:
        expert_bytes: bytes of one expert.
        bytes_per_s: of the link.
        layer_s: seconds of compute in one layer, everything resident.
        in_flight: most prefetches under way at once, one of them copying and the others behind it.
    """

    expert_bytes: int
    bytes_per_s: float
    layer_s: float
    in_flight: int = 4

    @property
    def copy_s(self) -> float:
        """Seconds one expert takes."""
        return self.expert_bytes / self.bytes_per_s


class LinkReplay:
    """Replay of one sequence through a cache, a prefetcher and a link.

    Args:
        link: the machine.
        cache: slots and policy.
        prefetcher: None for demand only.
        switch: decides for each step whether to predict, by the simulated clock; always when None.
    """

    def __init__(
        self,
        link: LinkModel,
        cache: ExpertCache,
        prefetcher: Prefetcher | None = None,
        switch: PredictionSwitch | None = None,
    ) -> None:
        self.link = link
        self.cache = cache
        self.prefetcher = prefetcher
        self._switch = switch
        self._predicting = prefetcher  # None while the switch is off
        # As the last step began: the clock (None before the first), misses so far, net seconds saved so far.
        self._before: tuple[float | None, int, float] = (
            None, 0, 0.0 if prefetcher is None else prefetcher.ledger.net_s
        )  # fmt: skip
        self.now_s = 0.0
        self.hits = self.late = self.misses = 0
        self._link_free_s = 0.0
        self._arrivals: dict[ExpertKey, float] = {}  # of the copies that have begun
        self._queue: deque[ExpertKey] = deque()  # prefetches that have not

    def begin_step(self, token_id: int) -> None:
        """Predict the step that feeds this token."""
        if self.prefetcher is not None and self._switch is not None:
            self._choose(self.prefetcher, self._switch)
        if self._predicting is not None:
            self._predicting.begin_step(np.array([token_id]))
            self._prefetch(self._predicting)

    def layer(self, layer: int, experts: np.ndarray, weights: np.ndarray | None, signal: np.ndarray | None) -> None:
        """Run one layer for one token: experts [K], weights [K], and the predictor's signal."""
        cache, predicting = self.cache, self._predicting
        self._advance()
        keys = [ExpertKey(layer, expert) for expert in experts.tolist()]
        cache.touch(keys)
        resident = [key for key in keys if cache.lookup(key) is not None]
        in_flight = [key for key in keys if key not in resident and key in cache.slots]
        absent = [key for key in keys if key not in cache.slots]
        for key in resident:
            cache.pin(key)
        self.hits, self.late, self.misses = (
            self.hits + len(resident),
            self.late + len(in_flight),
            self.misses + len(absent),
        )
        if predicting is not None:
            others = [key for key in self._arrivals if key not in in_flight]
            predicting.record_demand(Demand(layer, resident, in_flight, absent, self.link.copy_s, others))
        for key in in_flight:
            if key in self._queue:  # it jumps the queue
                self._queue.remove(key)
                self._copy(key)
        for key in absent:
            while cache.reserve(key) is None:
                self._give_way(keys)
            if predicting is not None:
                for gone in cache.evicted:
                    predicting.ledger.evict(gone)
            self._copy(key)
        ready_s = max([self.now_s] + [self._arrivals[key] for key in in_flight + absent])
        if predicting is not None:
            predicting.observe(layer, experts[None], None if weights is None else weights[None], signal)
            self._prefetch(predicting)
        for key in in_flight + absent:
            self._arrive(key, wanted=True)
        self.now_s = ready_s + self.link.layer_s
        for key in keys:
            cache.unpin(key)

    def _choose(self, prefetcher: Prefetcher, switch: PredictionSwitch) -> None:
        """Ask the switch about the step that begins, as the live loop does; off, it empties the queue."""
        began_s, before_missed, before_net_s = self._before
        missed, net_s = self.late + self.misses, prefetcher.ledger.net_s
        self._before = (self.now_s, missed, net_s)
        step_s = None if began_s is None else self.now_s - began_s
        on = switch.step(step_s, missed - before_missed, net_s - before_net_s)
        if self._predicting is not None and not on:
            for key in list(self._queue):
                self._drop(key)
            prefetcher.ledger.clear()
        self._predicting = prefetcher if on else None
        if not on:
            prefetcher.rest()

    def _copy(self, key: ExpertKey, begin_s: float = 0.0) -> None:
        self._link_free_s = max(self._link_free_s, begin_s or self.now_s) + self.link.copy_s
        self._arrivals[key] = self._link_free_s

    def _advance(self) -> None:
        """Let the link work up to now: queued copies begin, copies that have ended become resident."""
        while self._queue and self._link_free_s < self.now_s:
            self._copy(self._queue.popleft(), begin_s=self._link_free_s)
        for key in [key for key, arrival_s in self._arrivals.items() if arrival_s <= self.now_s]:
            self._arrive(key, wanted=False)

    def _arrive(self, key: ExpertKey, *, wanted: bool) -> None:
        del self._arrivals[key]
        self.cache.commit(key)
        if not wanted:
            self.cache.unpin(key)

    def _give_way(self, wanted: list[ExpertKey]) -> None:
        """Cancel the last prefetch in the queue, or wait for the first in flight, which can be evicted then."""
        if self._queue:
            self._drop(self._queue[-1])
            return
        first = min((key for key in self._arrivals if key not in wanted), key=self._arrivals.__getitem__)
        self.now_s = max(self.now_s, self._arrivals[first])
        self._arrive(first, wanted=False)

    def _drop(self, key: ExpertKey) -> None:
        assert self.prefetcher is not None, "only a prefetcher fills the queue"
        self._queue.remove(key)
        self.cache.abort(key)
        self.prefetcher.ledger.drop(key)

    def _prefetch(self, prefetcher: Prefetcher) -> None:
        """Queue the experts worth prefetching, and cancel those that come too late."""
        for key in prefetcher.overdue(list(self._queue)):
            self._drop(key)
        while len(self._queue) + len(self._arrivals) < self.link.in_flight:
            found = prefetcher.take()
            if found is None:
                return
            if self._link_free_s <= self.now_s:
                self._copy(found[0])
            else:
                self._queue.append(found[0])


def replay_link(
    trace: RoutingTrace,
    num_slots: int,
    link: LinkModel,
    *,
    policy: str = "lfru",
    predictor: Predictor | None = None,
    sequences: Sequence[int] | None = None,
    window: int | None = None,
    min_probability: float | None = None,
    num_steps: int = STEPS_AHEAD,
    switch: PredictionSwitch | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Replay the decode steps of a trace's sequences one after another, each from a cold cache.

    Prompts are shown to the predictor and cost nothing.

    Args:
        trace: the routing.
        num_slots: experts that fit, shared by all layers.
        link: the machine.
        policy: of the cache; "forecast" evicts by prediction.
        predictor: None for demand only.
        sequences: places in trace.sequences(); all when None.
        window, min_probability: see `Prefetcher`; its defaults when None.
        num_steps: steps ahead over which evictions compare predicted uses.
        switch: turns prediction off and on as in a live model; always on when None.
        progress: called with (tokens done, tokens in all).

    Returns:
        policy, slots, tokens, hit_rate, accesses, hits, late, misses, tokens_per_s, share (of the speed with
        everything resident) and, with a predictor, prefetch: the account of the prefetches.

    Raises:
        BudgetError: fewer slots than a layer's experts.
        ConfigError: these sequences have no decode steps.
    """
    if num_slots < trace.top_k:
        raise BudgetError(f"{num_slots} slots are fewer than the {trace.top_k} experts a token takes in one layer.")
    all_rows, numbers = trace.sequences(), np.arange(len(trace))
    chosen = [numbers[all_rows[place]] for place in (range(len(all_rows)) if sequences is None else sequences)]
    ledger = PrefetchLedger(trace.num_layers, expert_bytes=link.expert_bytes)
    num_tokens = sum(int((trace.phase[rows] == DECODE).sum()) for rows in chosen)
    if not num_tokens:
        raise ConfigError(f"{trace.name} has no decode rows here: there is nothing to replay. Record longer answers.")
    done = hits = late = misses = 0
    taken_s = 0.0
    for rows in chosen:
        cache, prefetcher = ExpertCache(num_slots, policy), None
        if predictor is not None:
            ledger.clear()
            prefetcher = Prefetcher(
                predictor, cache, ledger, window=window, min_probability=min_probability, num_steps=num_steps
            )
            prefetcher.begin(1)
            _show_prompt(predictor, trace, rows[trace.phase[rows] != DECODE])
        replay = LinkReplay(link, cache, prefetcher, switch)
        for row in rows[trace.phase[rows] == DECODE]:
            _replay_token(replay, trace, row)
            done += 1
            progress(done, num_tokens)
        taken_s += replay.now_s
        hits, late, misses = hits + replay.hits, late + replay.late, misses + replay.misses
    accesses = hits + late + misses
    result = {
        "policy": policy,
        "predictor": None if predictor is None else predictor.name,
        "slots": num_slots,
        "tokens": num_tokens,
        "accesses": accesses,
        "hits": hits,
        "late": late,
        "misses": misses,
        "hit_rate": hits / accesses,
        "tokens_per_s": num_tokens / taken_s,
        "share": num_tokens * trace.num_layers * link.layer_s / taken_s,
    }
    return result if predictor is None else {**result, "prefetch": ledger.as_dict()}


def _show_prompt(predictor: Predictor, trace: RoutingTrace, rows: np.ndarray) -> None:
    if len(rows):
        weights = trace.weights
        predictor.prefill(
            trace.token_ids[rows][None], trace.experts[rows][None], None if weights is None else weights[rows][None]
        )


def _replay_token(replay: LinkReplay, trace: RoutingTrace, row: int) -> None:
    experts, weights, lookahead = trace.experts[row], trace.weights, trace.lookahead
    recorded = replay.prefetcher is not None and replay.prefetcher.predictor.signal == "recorded"
    replay.begin_step(int(trace.token_ids[row]))
    for layer in range(trace.num_layers):
        chosen = experts[layer][experts[layer] != trace.none]
        signal = lookahead[row, layer][None] if recorded and lookahead is not None else None
        replay.layer(layer, chosen, None if weights is None else weights[row, layer][: len(chosen)], signal)
