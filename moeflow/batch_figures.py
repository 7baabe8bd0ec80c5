"""What a batch costs: tokens a second, hit rate, activated experts a step."""

import time

from moeflow.report import MISSING, format_percent, format_seconds, stats_delta


class BatchFigures:
    """The figures of a batch under way.

    Args:
        model: with a `moeflow` handle, whose counters are read.
        num_requests: how many there are to answer.
    """

    def __init__(self, model, num_requests: int):
        self._model = model
        self._num_requests = num_requests
        self._num_tokens = self._num_ended = 0
        self._before = model.moeflow.stats()
        self._begin_s = time.perf_counter()
        self._line_s = None  # when the last line was made

    @property
    def due(self) -> bool:
        """Whether a line is worth its milliseconds: at once, half a second after the last, and at the end."""
        if self._line_s is None or self._num_ended == self._num_requests:
            return True
        return time.perf_counter() - self._line_s >= 0.5

    @property
    def share(self) -> float:
        """Share of the requests that have ended, 0 to 1."""
        return self._num_ended / self._num_requests

    def add(self, num_tokens: int, num_ended: int) -> None:
        """Count what came of a step."""
        self._num_tokens += num_tokens
        self._num_ended += num_ended

    def as_dict(self) -> dict:
        """Return the figures up to now, for `json.dumps`.

        "experts_per_step" counts (layer, expert) pairs that a pass of the model demanded, on average of all passes.
        """
        elapsed_s = time.perf_counter() - self._begin_s
        delta = stats_delta(self._before, self._model.moeflow.stats())
        phases = [delta[name] for name in ("prefill", "decode")]
        hits, misses, forwards = (sum(phase[name] for phase in phases) for name in ("hits", "misses", "forwards"))
        figures = {
            "new_tokens": self._num_tokens,
            "elapsed_s": elapsed_s,
            "tokens_per_s": self._num_tokens / elapsed_s,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "experts_per_step": (hits + misses) / forwards if forwards else None,
        }
        return {**figures, "line": self._line(figures), "moeflow": delta}

    def line(self) -> str:
        """Return the figures as one line for a person."""
        self._line_s = time.perf_counter()
        return self.as_dict()["line"]

    def _line(self, figures):
        experts = figures["experts_per_step"]
        return " · ".join(
            (
                f"{self._num_ended} of {self._num_requests}",
                f"{figures['new_tokens']:,} tok in {format_seconds(figures['elapsed_s'])}",
                f"{figures['tokens_per_s']:.1f} tok/s",
                f"hit rate {format_percent(figures['hit_rate'])}",
                f"{MISSING if experts is None else f'{experts:.1f}'} experts a step",
            )
        )
