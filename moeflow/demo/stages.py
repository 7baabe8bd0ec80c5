"""Progress of a build in named stages, on standard error.

Knows terminals. Knows nothing of what is built.
"""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Stages:
    """Progress on stderr: a bar on a terminal, a line each quarter of a stage elsewhere.

    Args:
        enabled: whether anything is shown.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._bar: Progress | None = None
        self._total: int | None = None
        self._done = 0

    def start(self, name: str, total: int | None = None) -> None:
        """End the stage before and begin one of `total` steps, or of unknown length."""
        self._end()
        self._name, self._begin_s, self._total, self._done = name, time.monotonic(), total, 0
        if not self.enabled:
            return
        if not sys.stderr.isatty():
            print(f"demo model: {name}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.start()
        self._task = self._bar.add_task(name, total=total)

    def advance(self) -> None:
        """Count one step of the running stage."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self.enabled and self._total and self._done * 4 // self._total > (self._done - 1) * 4 // self._total:
            print(f"demo model: {self._name} {self._done} of {self._total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the last stage and leave the terminal as it was."""
        self._end()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _end(self) -> None:
        if not self._name:
            return
        self.seconds[self._name] = time.monotonic() - self._begin_s
        if self._bar is not None:
            if self._total is None:
                self._bar.update(self._task, total=1, completed=1)
            self._bar.stop_task(self._task)
        elif self.enabled:
            print(f"demo model: {self._name} took {self.seconds[self._name]:.0f} s", file=sys.stderr, flush=True)
        self._name = ""


def _rich_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
