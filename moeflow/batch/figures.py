"""What a batch costs: tokens a second, hit rate, activated experts a step, and how much of it is left."""

import time

from moeflow.batch.share import BatchShare
from moeflow.formatting import MISSING, format_bytes, format_percent, format_seconds, stats_delta


class BatchFigures:
    """The figures of a batch under way.

    Args:
        engine: what answers, without a step yet, on a model with a `moeflow` handle.
        requests: [num_requests], the `BatchRequest`s to answer.
    """

    def __init__(self, engine, requests: list):
        self._engine = engine
        self._share = BatchShare({request.id: request.params.max_new_tokens for request in requests})
        self._before = engine.model.moeflow.stats()
        self._begin_s = time.perf_counter()
        self._line_s = None  # when the last line was made

    @property
    def due(self) -> bool:
        """Whether a line is worth its milliseconds: at once, half a second after the last, and at the end."""
        if self._line_s is None or self._share.num_ended == self._share.num_requests:
            return True
        return time.perf_counter() - self._line_s >= 0.5

    @property
    def share(self) -> float:
        """Share of the batch that is done, 0 to 1."""
        return self._share.done

    def add(self, num_new: dict[str, int], ended: list[str]) -> None:
        """Count what came of a step: new tokens of each id that got some, and the ids that ended."""
        self._share.add(num_new, ended)

    def as_dict(self) -> dict:
        """Return the figures up to now, for `json.dumps`.

        "experts_per_step" counts (layer, expert) pairs that the routers of a step demanded, on average of all steps. A
        step of several passes counts a pair once for each pass that demanded it.
        """
        elapsed_s = time.perf_counter() - self._begin_s
        delta, engine = stats_delta(self._before, self._engine.model.moeflow.stats()), self._engine.stats()
        phases = [delta[name] for name in ("prefill", "decode")]
        hits, misses = (sum(phase[name] for phase in phases) for name in ("hits", "misses"))
        return {
            "new_tokens": self._share.num_tokens,
            "elapsed_s": elapsed_s,
            "tokens_per_s": self._share.num_tokens / elapsed_s,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "experts_per_step": (hits + misses) / engine["steps"] if engine["steps"] else None,
            "moeflow": delta,
            "engine": engine,
        }

    def line(self) -> str:
        """Return the figures as one line for a person."""
        self._line_s = time.perf_counter()
        return f"{self._share.num_ended:,} of {self._share.num_requests:,} done · {figures_line(self.as_dict())}"


def figures_line(figures: dict) -> str:
    """Write what stands in every line of a batch's progress.

    Args:
        figures: of `BatchFigures.as_dict`.
    """
    experts = figures["experts_per_step"]
    return " · ".join(
        (
            f"{figures['new_tokens']:,} tok",
            f"{figures['tokens_per_s']:.1f} tok/s",
            f"hit rate {format_percent(figures['hit_rate'])}",
            f"{MISSING if experts is None else f'{experts:,.0f}'} experts a step",
        )
    )


def summary_line(figures: dict) -> str:
    """Write what a batch took.

    Args:
        figures: of `BatchFigures.as_dict`.
    """
    moeflow = figures["moeflow"]
    return " · ".join(
        (
            format_seconds(figures["elapsed_s"]),
            figures_line(figures),
            f"{format_bytes(moeflow['io']['bytes'])} read",
            f"process {format_bytes(moeflow['memory']['process_peak_bytes'])} at most",
        )
    )
