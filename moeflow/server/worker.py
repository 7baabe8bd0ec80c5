"""The worker: one thread that alone touches the engine, steps it while anything is under way, and hands out outputs.

Knows the engine and answers. Knows nothing of HTTP's forms.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from moeflow.errors import ClosedModelError, ForkedProcessError, MoeflowError
from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from moeflow.engine.engine import Engine
    from moeflow.engine.request import StepOutput
    from moeflow.engine.sampling_params import SamplingParams
    from moeflow.engine.sequence import Images
    from moeflow.engine.serial.engine_with_images import EngineWithImages
    from moeflow.server.answers import Answers

_logger = logging.getLogger("moeflow.server")
_GATHERING_S = 0.02  # in which an engine that was idle waits at most for requests that come with its first
_LOOK_EVERY_S = 0.25  # at the figures, while steps run


class Asked(NamedTuple):
    """One request to the engine.

    Args:
        prompt_ids: its prompt.
        params: its sampling.
        priority: higher ones go first.
        images: what its prompt shows; None for nothing.
    """

    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    images: Images | None = None


@dataclass(frozen=True)
class _Place:
    """Where outputs of a request go."""

    answers: Answers
    index: int


class Worker:
    """The thread of one engine.

    Args:
        engine: what answers; the worker closes it. One without images gets no request that has some.
        look: takes the engine's and the model's figures; called in the worker's thread.
        when_read: called in an event loop; calls what it is given when the loop has submitted the requests that it has
            already received, if that is before a time of perf_counter.
        kv_disk: folder in which the engine's kept keys and values are saved as it is closed; None for none.

    Attributes:
        figures: what `look` returned last; as of now where nothing runs.
        refusal: why nothing more is answered; None while it is.
    """

    def __init__(
        self,
        engine: Engine | EngineWithImages,
        look: Callable[[], Any],
        when_read: Callable[[Callable[[], None], float], None],
        kv_disk: str | None = None,
    ) -> None:
        self._engine = engine
        self._look = look
        self._when_read = when_read
        self._kv_disk = kv_disk
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # of the last request that came to an idle engine
        self._places: dict[str, _Place] = {}  # the thread's alone
        self._num_under_way = 0
        self._ids = map("serve-{}".format, itertools.count(1))
        self._closing = False
        self._broken = False  # no step is run any more
        self.refusal: HttpError | None = None
        self.figures = look()
        self._looked_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="moeflow-server", daemon=True)
        self._thread.start()

    @property
    def num_under_way(self) -> int:
        """Requests that run, wait, or are on their way to the engine."""
        return self._num_under_way

    def submit(self, asked: list[Asked], answers: Answers) -> list[str]:
        """Queue requests, whose outputs go to `answers` in this order, and return their ids.

        Raises:
            HttpError: nothing is answered any more.
        """
        with self._changed:
            if self.refusal is not None:
                raise self.refusal
            if not self._num_under_way:
                self._loop = answers.loop
            ids = [next(self._ids) for _ in asked]
            self._num_under_way += len(asked)
            for index, (id, one) in enumerate(zip(ids, asked, strict=True)):
                self._commands.append(partial(self._add, id, one, _Place(answers, index)))
            self._changed.notify_all()
        return ids

    def cancel(self, ids: list[str]) -> None:
        """End requests that nothing waits for, if they are under way."""
        with self._changed:
            self._commands += [partial(self._drop, id) for id in ids]
            self._changed.notify_all()

    def drain(self, grace_s: float) -> bool:
        """Refuse new requests, let those under way finish, and end the rest with an error.

        Returns:
            Whether all had finished in time.
        """
        stopping = HttpError(503, "the server is stopping.", code="stopping")
        with self._changed:
            self.refusal = self.refusal or stopping
            finished = self._changed.wait_for(lambda: not self._num_under_way, grace_s)
            if not finished:
                self._commands.append(partial(self._fail_all, stopping))
                self._changed.notify_all()
        return finished

    def close(self) -> None:
        """End what is under way with an error, wait for the thread, and close the engine."""
        self.drain(0)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._kv_disk is not None:
            try:
                self._engine.save_kept(self._kv_disk)
            except MoeflowError as error:  # the server ends all the same
                _logger.warning("kept keys and values are not saved: %s", error)
            self._kv_disk = None
        self._engine.close()

    def _run(self) -> None:
        while self._obey():
            if self._steps_left:
                self._step()

    @property
    def _steps_left(self) -> bool:
        return not self._broken and not self._engine.finished

    def _obey(self) -> bool:
        """Run the commands that have come, or wait for some; return False where the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._closing or self._steps_left)
            loop, self._loop = self._loop, None
        if loop is not None and not self._steps_left:
            self._gather(loop)
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return not self._closing or bool(self._commands)

    def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until requests that came together are all there: under offloading one pass for all costs as one does."""
        read = threading.Event()
        try:
            loop.call_soon_threadsafe(self._when_read, read.set, time.perf_counter() + _GATHERING_S)
        except RuntimeError:  # the loop is closed
            return
        read.wait(_GATHERING_S)  # some are read for longer, or the loop ends

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except (ClosedModelError, ForkedProcessError) as error:
            self._give_up(HttpError(503, f"the model answers no more: {error}", code="closed"))
            return
        except Exception as error:  # of a pass: those that were in it end, the server goes on
            told = str(error) if isinstance(error, MoeflowError) else type(error).__name__
            self._fail_all(HttpError(500, f"a step of the engine failed: {told}", code="step_failed"))
            return
        now_s = time.perf_counter()
        ended = any(output.completion is not None for output in outputs)
        if ended or now_s - self._looked_s > _LOOK_EVERY_S:  # before a client knows that its answer has ended
            self._look_again()
        self._hand_out(outputs)

    def _look_again(self) -> None:
        self.figures = self._look()
        self._looked_s = time.perf_counter()

    def _add(self, id: str, asked: Asked, place: _Place) -> None:
        if self._broken and self.refusal is not None:
            self._end(place, self.refusal)
            return
        try:
            shown: dict[str, Any] = {} if asked.images is None else {"images": asked.images}
            self._engine.add(asked.prompt_ids, asked.params, id=id, priority=asked.priority, **shown)
        except MoeflowError as error:
            self._end(place, HttpError(400, str(error)))
        else:
            self._places[id] = place

    def _drop(self, id: str) -> None:
        if self._places.pop(id, None) is not None:
            self._ended(1)
            self._engine.cancel(id)

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Place, StepOutput]]] = defaultdict(list)
        ended = 0
        for output in outputs:
            place = self._places.get(output.id)
            if place is None:  # it was cancelled
                continue
            if output.completion is not None:
                del self._places[output.id]
                ended += 1
            by_loop[place.answers.loop].append((place, output))
        self._ended(ended)
        for loop, handed in by_loop.items():
            try:
                loop.call_soon_threadsafe(_take, handed)
            except RuntimeError:  # the loop is closed
                for _, output in handed:
                    self._drop(output.id)

    def _end(self, place: _Place, error: HttpError) -> None:
        """End one request of which the engine knows nothing."""
        self._ended(1)
        _fail(place, error)

    def _ended(self, count: int) -> None:
        if count:
            with self._changed:
                self._num_under_way -= count
                self._changed.notify_all()

    def _fail_all(self, error: HttpError) -> None:
        places, self._places = self._places, {}
        try:
            for id in places:
                self._engine.cancel(id)
        except Exception as failure:
            self._broken = True
            self.refusal = HttpError(503, f"the engine failed: {type(failure).__name__}", code="failed")
        for place in places.values():
            self._end(place, error)

    def _give_up(self, refusal: HttpError) -> None:
        """Answer nothing more; the thread goes on refusing what is on its way."""
        self._broken, self.refusal = True, refusal
        self._fail_all(refusal)
        self._engine.close()


def _take(handed: list[tuple[_Place, StepOutput]]) -> None:
    for place, output in handed:
        place.answers.take(place.index, output)


def _fail(place: _Place, error: HttpError) -> None:
    try:
        place.answers.loop.call_soon_threadsafe(place.answers.fail, error)
    except RuntimeError:  # the loop is closed
        return
