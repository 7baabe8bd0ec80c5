"""Prediction beside a running model: feeds the predictor, pauses it where it does not pay, drops it when it fails.

The one place where tensors become the predictor's arrays. Knows nothing of slots or copies.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moeflow.offload.stats import PhaseStats, PredictionStats
from moeflow.policy.demand import Demand
from moeflow.policy.prediction_switch import PredictionSwitch
from moeflow.policy.prefetch import Prefetcher

if TYPE_CHECKING:
    from moeflow.hf.passes.residual import ResidualTap

logger = logging.getLogger(__name__)


class RouterOutput(NamedTuple):
    """What one layer's router chose in one pass.

    It reaches the predictor with the layer's demand and not through a `RouteObserver`: the predictor takes it in under
    the runtime's lock, and only after the reads of absent experts were started, so that it runs beside them.

    Args:
        top_k_index: int64 [T, K], expert numbers; a number of num_experts or more means none.
        top_k_weights: float32 [T, K].
        hidden_states: [T, H], what the router saw; None where the predictor's signal is here already.
        signal: what `PredictionLoop.signal` gave, in host memory.
    """

    top_k_index: np.ndarray
    top_k_weights: np.ndarray
    hidden_states: torch.Tensor | None
    signal: np.ndarray | None = None


class PredictionLoop:
    """Runs one prefetcher along the passes of one model.

    Args:
        prefetcher: the predictor, the forecast and the ledger.
        switch: decides for each decode step whether to predict.
        tap: shows the residual stream, where that is the predictor's signal.
    """

    def __init__(
        self, prefetcher: Prefetcher, switch: PredictionSwitch | None = None, *, tap: "ResidualTap | None" = None
    ) -> None:
        self.watching = False  # whether the routes of the pass under way are wanted
        self.failure: str | None = None
        self.prefetcher = prefetcher
        self._switch = switch or PredictionSwitch()
        self._tap = tap
        self.predictor = prefetcher.predictor
        self._num_sequences = 0
        # Token ids [B, T] of the prefill under way, and (experts, weights) [B * T, K] of each layer so far.
        self._prompt: tuple[torch.Tensor, list[tuple[np.ndarray, np.ndarray]]] | None = None
        self._began: float | None = None  # when the decode step before this one began
        self._before = (0, 0.0)  # misses and the ledger's net seconds at that time
        self._steps = {True: 0, False: 0}

    def begin_forward(
        self,
        token_ids: torch.Tensor | None,
        num_sequences: int,
        num_positions: int,
        continues: bool,
        stats: PhaseStats,
    ) -> None:
        """Begin a pass over [num_sequences, num_positions] tokens, and predict it if it is a decode step that pays."""
        if self.failure is None:
            self._begin_pass(token_ids, num_sequences, num_positions, continues, stats)
        if self._tap is not None:
            self._tap.listen(self.watching)

    def record_demand(self, demand: Demand) -> None:
        """Enter what a layer demanded, where the pass under way is predicted."""
        if self.prefetcher.active:
            self.prefetcher.record_demand(demand)

    def observe(self, layer: int, router_output: RouterOutput, stats: PhaseStats) -> None:
        """Show the predictor what a layer's router chose."""
        if not self.watching:
            return
        begin = time.perf_counter()
        experts, weights, hidden_states = router_output[:3]
        signal: Any = router_output.signal
        if self._prompt is not None:
            self._prompt[1].append((experts, weights))
            return
        if hidden_states is not None and self._tap is not None:
            signal = self._tap.residual(layer, hidden_states)
        elif signal is not None and not hasattr(self.predictor, "ask"):
            signal = torch.from_numpy(signal)
        self._guarded(self.prefetcher.observe, layer, experts, weights, signal)
        stats.predict_s += time.perf_counter() - begin

    def signal(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return what the predictor wants to see of a layer besides its routes, on the device; None for nothing.

        Args:
            layer: number among the MoE layers.
            hidden_states: [T, H], what its router saw.
        """
        if self._tap is None or not self.watching or self._prompt is not None:
            return None
        residual = self._tap.residual(layer, hidden_states)
        ask = getattr(self.predictor, "ask", None)
        return residual if residual is None or ask is None else self._guarded(ask, layer, residual)

    def owns_hook(self, hook: object) -> bool:
        """Whether a forward hook of the model is prediction's own, so that `taken` replaces it."""
        return self._tap is not None and self._tap.owns(hook)

    def taken(self, layer: int) -> Callable[[], None] | None:
        """Take what hooks saw of a layer, in tensors that stay; return what shows it again, None for nothing."""
        return None if self._tap is None else self._tap.taken(layer)

    def clear(self) -> None:
        """Forget prefetches and pause: the cache was emptied."""
        self.prefetcher.ledger.clear()
        self._pause()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Predict nothing and take nothing in, between two passes."""
        self._pause()
        prompt, self._prompt = self._prompt, None
        try:
            yield
        finally:
            self._prompt = prompt

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self.prefetcher.ledger.reset()
        self._steps = {True: 0, False: 0}
        self._before = (0, 0.0)

    def stats(self) -> PredictionStats:
        """Return what prediction has done."""
        return PredictionStats(
            predictor=self.predictor.name,
            on=self.failure is None and self._switch.on,
            reason="it failed" if self.failure else self._switch.reason,
            failure=self.failure,
            steps_on=self._steps[True],
            steps_off=self._steps[False],
            trials=self._switch.num_trials,
            prefetch=self.prefetcher.ledger.counts(),
        )

    def _begin_pass(
        self,
        token_ids: torch.Tensor | None,
        num_sequences: int,
        num_positions: int,
        continues: bool,
        stats: PhaseStats,
    ) -> None:
        begin = time.perf_counter()
        self._guarded(self._end_prefill)
        decode = continues and num_positions == 1
        if not continues:
            self._begin_prefill(token_ids, num_sequences)
        elif token_ids is None:  # unknown tokens: their sequences are unknown too, in this pass and the next
            self._pause()
            self._num_sequences = 0
        elif not decode:  # several positions at once, as assisted generation verifies: not predicted
            self._pause()
        else:
            on = self._choose(begin, stats)
            self._steps[on] += 1
            if not on:
                self._pause()
            else:
                self._guarded(self._begin_step, token_ids, num_sequences)
        self._began = begin if decode and token_ids is not None else None
        stats.predict_s += time.perf_counter() - begin

    def _choose(self, now: float, stats: PhaseStats) -> bool:
        step_s = None if self._began is None else now - self._began
        misses, net_s = stats.misses, self.prefetcher.ledger.net_s
        before_misses, before_net_s = self._before
        self._before = (misses, net_s)
        if self.prefetcher.everything_fits:
            return self._switch.rest()
        return self._switch.step(step_s, misses - before_misses, net_s - before_net_s)

    def _begin_prefill(self, token_ids: torch.Tensor | None, num_sequences: int) -> None:
        """Watch without predicting: a prompt demands nearly every expert, and all its reads are in flight at once."""
        self._pause()
        self._num_sequences = num_sequences
        self._guarded(self.prefetcher.begin, num_sequences)
        self.prefetcher.rest()
        if token_ids is not None and self._switch.on and self.predictor.signal == "none":
            self.watching, self._prompt = True, (token_ids, [])
        else:
            self.watching, self._prompt = False, None

    def _end_prefill(self) -> None:
        """Hand the prompt's routes to the predictor, if every layer was seen."""
        if self._prompt is None:
            return
        (token_ids, routes), self._prompt = self._prompt, None
        num_sequences, num_positions = token_ids.shape
        shape = (num_sequences, num_positions, -1)
        if len(routes) == self.predictor.num_layers and all(
            len(experts) == num_sequences * num_positions for experts, _ in routes
        ):
            experts = np.stack([experts.reshape(shape) for experts, _ in routes], axis=2)
            weights = np.stack([weights.reshape(shape) for _, weights in routes], axis=2)
            self.predictor.prefill(token_ids.cpu().numpy(), experts, weights)

    def _begin_step(self, token_ids: torch.Tensor, num_sequences: int) -> None:
        if num_sequences != self._num_sequences:  # beams, or sequences that were added
            self._num_sequences = num_sequences
            self.prefetcher.begin(num_sequences)
        self.watching = True
        self.prefetcher.begin_step(token_ids[:, 0].cpu().numpy())

    def _pause(self) -> None:
        if self.prefetcher.active:
            self.prefetcher.ledger.clear()
        self.watching = False
        self.prefetcher.rest()

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run the predictor and return its answer; any error switches it off for good, and generation goes on."""
        try:
            return call(*args)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._prompt = None
            self._pause()
            logger.warning(
                "predictor %r failed and is switched off, generation goes on without it: %s",
                self.predictor.name,
                self.failure,
            )
            return None
