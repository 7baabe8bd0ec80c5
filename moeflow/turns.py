"""Turns of threads at one thing: the passes of a model, the steps of an engine. No thread waits for ever.

Knows threads. Knows nothing of models.
"""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

_GIVEN_WAY_S = 1e-4  # in which a thread that waits takes its turn
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Turns:
    """A lock that gives way: a thread that takes turn after turn lets those that wait go in between.

    The thread that has the turn may take it again.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()  # the type has no _is_owned
        self._waiting: set[object] = set()

    def run(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call in this thread's turn. An interrupt in any line leaves nothing locked."""
        waiter = object()
        self._waiting.add(waiter)
        try:
            with self._lock:
                self._waiting.discard(waiter)
                return call(*args, **kwargs)
        finally:
            self._waiting.discard(waiter)
            if self._waiting and not self._lock._is_owned():
                time.sleep(_GIVEN_WAY_S)

    def renew(self) -> bool:
        """Begin anew in the child of a fork; return whether no thread of the parent's was in its turn."""
        self._waiting.clear()
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return True
        self._lock = threading.RLock()
        return False


def in_turn(method: Callable[Concatenate[Any, Arguments], Result]) -> Callable[Concatenate[Any, Arguments], Result]:
    """Run a method in the turn that its object's `_turns` gives."""

    @functools.wraps(method)
    def taken(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._turns.run(method, self, *args, **kwargs)

    return taken
