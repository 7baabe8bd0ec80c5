"""Answers under way: outputs of the engine's thread on their way to one HTTP request.

Knows asyncio and the engine's outputs. Knows nothing of HTTP's forms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from moeflow.engine.request import StepOutput


class AnswerTimes(NamedTuple):
    """How an answer came.

    Args:
        reason: why it ended, as in `Completion`.
        ttft_s: seconds from its request to its first token; None where there was none.
        tpot_s: mean seconds from token to token behind the first; None for fewer than two.
    """

    reason: str
    ttft_s: float | None
    tpot_s: float | None


class Watcher(Protocol):
    """Counts answers as they end."""

    def ended(self, times: AnswerTimes) -> None:
        """Take in one that ended."""


class Answers:
    """The answers to one HTTP request; made and read in its event loop.

    Args:
        count: how many there are.
        cancel: called with the indices of those that nothing reads any more.
        most_unread: most outputs that wait to be read; then the answers are cancelled.
        watcher: told of each that ends.
    """

    def __init__(self, count: int, cancel: Callable[[list[int]], None], *, most_unread: int, watcher: Watcher) -> None:
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._most_unread = most_unread
        self._watcher = watcher
        self._under_way = set(range(count))
        self._unread: list[tuple[int, StepOutput]] = []
        self._failure: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._begin_s = time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._num_tokens = dict.fromkeys(range(count), 0)

    def take(self, index: int, output: StepOutput) -> None:
        """Take in an output, in the event loop's thread."""
        if index not in self._under_way or self._failure is not None:
            return
        self._count(index, output)
        completion = output.completion
        if completion is not None:
            self._under_way.discard(index)
            if completion.finish_reason in ("error", "cancelled"):
                self.fail(HttpError(500, completion.error or "the answer was cancelled.", code="answer_failed"))
                return
        self._unread.append((index, output))
        if len(self._unread) > self._most_unread:
            self.fail(HttpError(503, "the answer was cancelled: it was not read.", code="not_read"))
        self._wake()

    def fail(self, error: HttpError) -> None:
        """End every answer with an error, behind the outputs that are there."""
        if self._failure is None:
            self._failure = error
            self._stop("error")
            self._wake()

    def close(self) -> None:
        """Cancel what is under way; called again it does nothing."""
        self._stop("cancelled")

    def _stop(self, reason: str) -> None:
        left, self._under_way = sorted(self._under_way), set()
        if left:
            self._cancel(left)
        for _ in left:
            self._watcher.ended(AnswerTimes(reason, None, None))

    async def outputs(self, ping_s: float | None = None) -> AsyncIterator[list[tuple[int, StepOutput]]]:
        """Yield what has come, as (index of the answer, output), until all have ended.

        Args:
            ping_s: seconds after which an empty list is yielded where nothing has come; None to wait on.

        Raises:
            HttpError: an answer failed.
        """
        while True:
            if self._unread:
                unread, self._unread = self._unread, []
                yield unread
            elif self._failure is not None:
                raise self._failure
            elif not self._under_way:
                return
            elif not await self._wait(ping_s):
                yield []

    async def _wait(self, timeout_s: float | None) -> bool:
        """Wait for something to come, and return whether it did in time."""
        self._waiter = self.loop.create_future()
        timer = None if timeout_s is None else self.loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        return bool(self._unread) or self._failure is not None or not self._under_way

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _count(self, index: int, output: StepOutput) -> None:
        now_s = time.perf_counter()
        if output.token_ids:
            self._first_s.setdefault(index, now_s)
            self._num_tokens[index] += len(output.token_ids)
        if output.completion is not None:
            first_s, more = self._first_s.get(index), self._num_tokens[index] - 1
            ttft_s = None if first_s is None else first_s - self._begin_s
            tpot_s = None if first_s is None or more < 1 else (now_s - first_s) / more
            self._watcher.ended(AnswerTimes(output.completion.finish_reason, ttft_s, tpot_s))
