"""A flag that a signal handler may set.

Knows nothing of chats.
"""

from __future__ import annotations


class StopFlag:
    """Says whether an answer is to end; one thread sets it, another asks.

    Nothing in it waits. `threading.Event.set` takes a lock that is not reentrant: a second Ctrl-C, whose handler runs
    while the first one's holds that lock, would wait for itself.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Ask for the end."""
        self._is_set = True

    def clear(self) -> None:
        """Take it back."""
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether the end is asked for."""
        return self._is_set
