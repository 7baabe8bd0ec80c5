"""Figures of a batch: tokens a second, hit rate, experts a step, and its estimated progress.

Knows the engine's and the runtime's counters. Knows nothing of files or terminals.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from moeflow.formatting import MISSING, format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from moeflow.batch.requests import BatchRequest
    from moeflow.engine.engine import Engine
    from moeflow.offload.runtime import ExpertRuntime


class BatchShare:
    """Estimated progress of a batch whose answer lengths are unknown.

    Args:
        most_tokens: the most tokens each id may get.
    """

    def __init__(self, most_tokens: dict[str, int]) -> None:
        self._most_tokens = most_tokens
        self._waiting = Counter(most_tokens.values())  # requests without a token, by the most they may get
        self._running: dict[str, int] = {}  # tokens that each of the others may still get
        self._num_answered = 0
        self.num_requests = len(most_tokens)
        self.num_tokens = self.num_ended = 0

    @property
    def done(self) -> float:
        """Share of the batch's tokens that are there, 0 to 1.

        A request is expected to get as many more tokens as the mean length, and no more than its maximum allows. The
        mean is all tokens over the answers that ended: so those under way count with what they have, and early enders
        do not make the batch look short.
        """
        if self.num_ended == self.num_requests:
            return 1.0
        mean = self.num_tokens / self._num_answered if self._num_answered else float("inf")
        num_left = sum(min(mean, most) * number for most, number in self._waiting.items())
        num_left += sum(min(mean, most) for most in self._running.values())
        return self.num_tokens / (self.num_tokens + num_left)

    def add(self, num_new: dict[str, int], ended: list[str]) -> None:
        """Count the outputs of a step.

        Args:
            num_new: new tokens of each id that got some.
            ended: ids that ended; one without a token has failed.
        """
        for name, number in num_new.items():
            if number:
                if name not in self._running:
                    self._running[name] = self._leave_waiting(name)
                self._running[name] -= number
                self.num_tokens += number
        for name in ended:
            if self._running.pop(name, None) is None:
                self._leave_waiting(name)
            else:
                self._num_answered += 1
        self.num_ended += len(ended)

    def _leave_waiting(self, name: str) -> int:
        most = self._most_tokens[name]
        self._waiting[most] -= 1
        return most


class BatchFigures:
    """The figures of a batch under way.

    Args:
        engine: what answers, without a step yet, on a model with a `moeflow` handle.
        requests: [num_requests], the `BatchRequest`s to answer.
    """

    def __init__(self, engine: Engine, requests: list[BatchRequest]) -> None:
        self._engine = engine
        self._share = BatchShare({request.id: request.params.max_new_tokens for request in requests})
        self._runtime = cast("ExpertRuntime", engine.model.moeflow)  # transformers types it as a module
        self._before = self._runtime.snapshot()
        self._begin_s = time.perf_counter()
        self._line_s: float | None = None  # when the last line was made

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
        """Count the outputs of a step: new tokens of each id that got some, and the ids that ended."""
        self._share.add(num_new, ended)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures up to now, for `json.dumps`.

        "experts_per_step" counts (layer, expert) pairs that the routers of a step demanded, on average of all steps. A
        step of several passes counts a pair once for each pass that demanded it.
        """
        elapsed_s = time.perf_counter() - self._begin_s
        cost, engine = self._runtime.snapshot() - self._before, self._engine.stats()
        hits, misses = cost.prefill.hits + cost.decode.hits, cost.prefill.misses + cost.decode.misses
        return {
            "new_tokens": self._share.num_tokens,
            "elapsed_s": elapsed_s,
            "tokens_per_s": self._share.num_tokens / elapsed_s,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "experts_per_step": (hits + misses) / engine["steps"] if engine["steps"] else None,
            "moeflow": cost.as_dict(),
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
