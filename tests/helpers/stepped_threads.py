"""Threads of which one runs at a time; at each step the next is drawn at random, so that a seed gives one order.

Stand-ins for `threading.Thread` and `queue.SimpleQueue`. What a thread hands to another through a queue, a start or a
join is told to the race detector.
"""

import collections
import contextlib
import queue
import threading
from types import SimpleNamespace


def _always() -> bool:
    return True


class SteppedThreads:
    """The calling thread and those that it starts.

    Args:
        random: draws the order.
        detector: a `RaceDetector`.
    """

    def __init__(self, random, detector):
        self._random = random
        self._detector = detector
        self._main = threading.current_thread()
        self._wakes = {self._main: threading.Semaphore(0)}
        self._waiting = {}  # of each thread that does not run: whether it could go on
        self._stuck = self._over = False
        self.queue = SimpleNamespace(SimpleQueue=lambda: _Queue(self), Empty=queue.Empty)
        self.threading = SimpleNamespace(
            Thread=lambda **options: _Thread(self, **options), current_thread=threading.current_thread
        )

    def step(self, ready=_always) -> None:
        """Let other threads run, perhaps none; return when it is this thread's turn again and `ready()`."""
        me = threading.current_thread()
        if self._over and me is self._main:
            return
        self._waiting[me] = ready
        chosen = self._choose()
        if chosen is not me:
            self._wakes[chosen].release()
            self._wakes[me].acquire()
        del self._waiting[me]
        if self._over:
            raise SystemExit
        assert not self._stuck, "every thread waits for another"

    def end(self) -> None:
        """End the threads that are left over, wherever they wait."""
        self._over = True
        left = [thread for thread in self._wakes if thread is not self._main]
        for thread in left:
            if thread.is_alive():
                self._wakes[thread].release()
                threading.Thread.join(thread)

    def _choose(self):
        able = [thread for thread, ready in self._waiting.items() if ready()]
        self._stuck = not able
        return self._random.choice(able) if able else self._main


class _Thread(threading.Thread):
    def __init__(self, threads, **options):
        super().__init__(**options)
        self._turns = threads
        self._finished = False

    def start(self):
        self._begun = self._turns._detector.mark(self._turns._detector.host())
        self._turns._wakes[self] = threading.Semaphore(0)
        self._turns._waiting[self] = _always
        super().start()

    def run(self):
        turns, detector = self._turns, self._turns._detector
        turns._wakes[self].acquire()
        del turns._waiting[self]
        if turns._over:
            return
        detector.wait(detector.host(), self._begun)
        try:
            with contextlib.suppress(SystemExit):
                super().run()
        finally:
            self._end = detector.mark(detector.host())
            self._finished = True
            if not turns._over:
                turns._wakes[turns._choose()].release()

    def join(self, timeout=None):
        turns, detector = self._turns, self._turns._detector
        turns.step(lambda: self._finished)
        if self._finished:
            detector.wait(detector.host(), self._end)
        super().join(timeout)


class _Queue:
    def __init__(self, threads):
        self._turns = threads
        self._items = collections.deque()

    def put(self, item):
        detector = self._turns._detector
        self._items.append((item, detector.mark(detector.host())))

    def get(self):
        self._turns.step(lambda: bool(self._items))
        return self._take()

    def empty(self):
        self._turns.step()
        return not self._items

    def get_nowait(self):
        self._turns.step()
        if not self._items:
            raise queue.Empty
        return self._take()

    def _take(self):
        detector = self._turns._detector
        item, mark = self._items.popleft()
        detector.wait(detector.host(), mark)
        return item
