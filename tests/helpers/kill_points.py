"""Kills a writer at each line of it, in children of a fork, and lets the next run show what it makes of the rest."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType

from helpers.forks import in_child


def kill_at_each_line(call: Callable[[], object], *modules: ModuleType, every: int = 1) -> Iterator[str]:
    """Run `call` in a child of a fork for each line of these modules, killed before the line's first and last time.

    Args:
        call: writes something; it begins at the same state each time: the user of the iterator restores it.
        modules: whose lines count.
        every: of the lines, one in so many is tried.

    Yields:
        "file.py:line" after each kill.
    """
    files = {module.__file__ for module in modules}
    told = tempfile.TemporaryFile()  # noqa: SIM115

    def record():
        lines = []
        _trace(files, lambda place: lines.append(place))
        call()
        sys.settrace(None)
        told.write("\n".join(lines).encode())
        told.flush()

    assert in_child(record) == 0, "it ends well when it is not killed"
    with told:
        told.seek(0)
        lines = told.read().decode().split("\n")
    yield "not killed"
    for place in list(dict.fromkeys(lines))[::every]:
        times = [number for number, line in enumerate(lines) if line == place]
        for number in sorted({times[0], times[-1]}):
            assert in_child(lambda number=number: _killed(call, files, number)) == -signal.SIGKILL, place
            yield place


def _killed(call: Callable[[], object], files: set[str], number: int) -> None:
    seen = 0

    def count(place):
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    _trace(files, count)
    call()


def _trace(files: set[str], told: Callable[[str], None]) -> None:
    """Tell of each line of these files that this thread runs."""

    def local(frame, event, argument):
        if event == "line":
            told(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        return local

    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename in files else None)
