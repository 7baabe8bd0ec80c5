"""Figures for Prometheus: what the engine and the model count, and how answers came.

Knows snapshots of figures. Knows nothing of threads or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from moeflow.server.answers import AnswerTimes

_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TPOT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PHASES = {  # of `RuntimeStats`: field of a phase -> (name, meaning)
    "tokens": ("moeflow_tokens", "new positions computed"),
    "forwards": ("moeflow_passes", "passes of the model"),
    "hits": ("moeflow_expert_hits", "demanded experts that were resident"),
    "misses": ("moeflow_expert_misses", "demanded experts that were not"),
    "stall_s": ("moeflow_stall_seconds", "in which compute waited for an expert"),
    "compute_s": ("moeflow_expert_compute_seconds", "in the experts' arithmetic"),
    "predict_s": ("moeflow_predict_seconds", "in prediction"),
}
_TIERS = {"bytes_from_disk": "disk", "bytes_from_host": "host"}
_ENGINE = {  # of `Engine.stats()`: name -> (name, meaning)
    "prompt_tokens": ("moeflow_prompt_tokens", "of prompts that were computed"),
    "shared_tokens": ("moeflow_shared_tokens", "of prompts whose keys and values were there"),
    "new_tokens": ("moeflow_generated_tokens", "of answers"),
    "steps": ("moeflow_engine_steps", "of the engine"),
    "step_s": ("moeflow_engine_step_seconds", "in the engine's steps"),
}
_GAUGES = {
    "running": ("moeflow_requests_running", "requests that run"),
    "waiting": ("moeflow_requests_waiting", "requests that wait"),
    "kv_used_bytes": ("moeflow_kv_used_bytes", "of keys and values in use"),
    "kv_budget_bytes": ("moeflow_kv_budget_bytes", "of keys and values at most"),
}


class Metrics:
    """The registry of one server.

    Args:
        figures: returns the engine's and the model's newest figures, as `Service.figures`; None before there are any.
    """

    def __init__(self, figures: Callable[[], dict[str, Any] | None]) -> None:
        self._figures = figures
        self._registry = CollectorRegistry()
        self._ttft_s = self._histogram("moeflow_time_to_first_token_seconds", "from request to first token", _TTFT_S)
        self._tpot_s = self._histogram("moeflow_time_per_token_seconds", "mean of an answer, behind its first", _TPOT_S)
        self._ended = Counter("moeflow_answers", "by why they ended", ["reason"], registry=self._registry)
        self._registry.register(_Figures(figures))

    def ended(self, times: AnswerTimes) -> None:
        """Count an answer."""
        self._ended.labels(times.reason).inc()
        if times.ttft_s is not None:
            self._ttft_s.observe(times.ttft_s)
        if times.tpot_s is not None:
            self._tpot_s.observe(times.tpot_s)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text form."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, meaning: str, limits: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=limits, registry=self._registry)


class _Figures:
    """Collector of what the engine and the model count."""

    def __init__(self, figures: Callable[[], dict[str, Any] | None]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the newest figures."""
        figures = self._figures()
        if figures is None:
            return
        engine, model = figures["engine"], figures["model"]
        for key, (name, meaning) in _ENGINE.items():
            yield CounterMetricFamily(name, meaning, value=engine[key])
        for key, (name, meaning) in _GAUGES.items():
            yield GaugeMetricFamily(name, meaning, value=engine[key])
        if model is not None:
            yield from _of_model(model)


def _of_model(model: dict[str, Any]) -> Iterator[Metric]:
    phases = ("prefill", "decode")
    for key, (name, meaning) in _PHASES.items():
        counter = CounterMetricFamily(name, meaning, labels=["phase"])
        for phase in phases:
            counter.add_metric([phase], model[phase][key])
        yield counter
    moved = CounterMetricFamily("moeflow_expert_bytes", "of experts brought, by tier", labels=["phase", "tier"])
    for phase in phases:
        for key, tier in _TIERS.items():
            moved.add_metric([phase, tier], model[phase][key])
    yield moved
    memory = GaugeMetricFamily("moeflow_memory_bytes", "now and at most, by what takes them", labels=["what"])
    for key, value in model["memory"].items():
        memory.add_metric([key.removesuffix("_bytes")], value)
    yield memory
