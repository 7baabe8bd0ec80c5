"""Tells objects that they live in the child of a fork, where their threads did not come along.

Knows processes. Knows nothing of what an object does about it.
"""

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """What begins anew, or refuses to go on, in the child of a fork."""

    def after_fork(self) -> None:
        """Begin anew. Only the thread that forked is there, in any line of its work; others left theirs half done."""


_told: "weakref.WeakSet[Forked]" = weakref.WeakSet()


def tell_of_forks(told: Forked) -> None:
    """Call `told.after_fork()` in every child of a fork, as long as the object lives."""
    _told.add(told)


def _tell_all() -> None:
    for told in list(_told):
        told.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_tell_all)
