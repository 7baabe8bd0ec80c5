"""One capture at a time in a process, and no pass of another thread meanwhile.

torch.export sets flags that every thread reads: passes beside it would take other ways, and other bits.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from moeflow.fork import tell_of_forks

_LOOKED_S = 1e-3  # how long a capture waits before it looks again whether passes have ended
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class CaptureGate:
    """Lets passes of several threads through, or one capture. An interrupt in any line leaves nothing locked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the capture under way
        self._capturing: int | None = None  # its thread
        self._passing: set[int] = set()  # threads
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Begin anew in the child of a fork; the capture of another thread ended with it, and left its flags."""
        me = threading.get_ident()
        self._passing &= {me}
        if self._capturing == me:
            return
        if self._capturing is not None:
            torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
        self._capturing, self._lock = None, threading.Lock()

    def run(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run a pass, or a part of one, while nothing is captured by another thread."""
        me = threading.get_ident()
        if me in self._passing or self._capturing == me:
            return call(*args, **kwargs)
        try:
            self._enter(me)
            return call(*args, **kwargs)
        finally:
            self._passing.discard(me)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Wait for the passes of other threads, then keep them waiting."""
        me = threading.get_ident()
        was_passing = me in self._passing
        self._passing.discard(me)
        try:
            with self._lock:
                try:
                    self._capturing = me
                    while any(map(self._is_passing, list(self._passing))):
                        time.sleep(_LOOKED_S)
                    yield
                finally:
                    self._capturing = None
        finally:
            if was_passing:
                self._enter(me)

    def _is_passing(self, thread: int) -> bool:
        """Whether a thread that was noted is in a pass; where an interrupt kept it from saying its end, forget it."""
        frame = sys._current_frames().get(thread)
        while frame is not None:
            if frame.f_code is CaptureGate.run.__code__:
                return True
            frame = frame.f_back
        self._passing.discard(thread)
        return False

    def _enter(self, me: int) -> None:
        self._passing.add(me)
        while self._capturing is not None:
            self._passing.discard(me)
            with self._lock:  # once the capture is over
                self._passing.add(me)


capture_gate = CaptureGate()
