"""Progress of a build in named stages, on standard error, with the time left.

Knows terminals, and what share of a build each stage takes. Knows nothing of what is built.
"""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeflow.formatting import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_EVERY_S = 60.0  # without a terminal, where a quarter of a stage takes longer


class Stages:
    """Progress on stderr: a bar on a terminal; a line each quarter of a stage, and at least each minute, elsewhere.

    Args:
        enabled: whether anything is shown.
        shares: of the time of a whole build, by stage; without one for a stage, no time left is shown in it.
    """

    def __init__(self, enabled: bool = True, shares: Mapping[str, float] | None = None) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = {}
        self._shares = dict(shares or {})
        self._name = ""
        self._bar: Progress | None = None
        self._total: int | None = None
        self._done = 0

    def start(self, name: str, total: int | None = None) -> None:
        """End the stage before and begin one of `total` steps, or of unknown length."""
        self._end()
        self._name, self._begin_s, self._total, self._done = name, time.monotonic(), total, 0
        self._line_s = self._counted_from_s = self._begin_s
        self._repeated = 0
        if not self.enabled:
            return
        if not sys.stderr.isatty():
            print(f"demo model: {name}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.start()
        self._task = self._bar.add_task(name, total=total, left="")

    def advance(self) -> None:
        """Count one step of the running stage."""
        self._done += 1
        left = self._told_left()
        if self._bar is not None:
            self._bar.update(self._task, advance=1, left=left)
        elif self.enabled and self._total:
            now_s = time.monotonic()
            in_new_quarter = self._done * 4 // self._total > (self._done - 1) * 4 // self._total
            if in_new_quarter or now_s - self._line_s >= _LINE_EVERY_S:
                self._line_s = now_s
                line = f"demo model: {self._name} {self._done} of {self._total}"
                print(f"{line}, {left}" if left else line, file=sys.stderr, flush=True)

    def repeat(self) -> None:
        """Count a step that an earlier run did and this one only went over, which is quicker."""
        self._repeated += 1
        self.advance()
        self._counted_from_s = time.monotonic()

    def seconds_left(self) -> float | None:
        """Return about how long the build will still take; None where this run has not done enough to tell."""
        if not self._total or self._name not in self._shares:
            return None
        names = list(self._shares)
        share = self._shares[self._name]
        spent_s = time.monotonic() - self._counted_from_s
        done = share * (self._done - self._repeated) / self._total
        left = share * (1 - self._done / self._total)
        left += sum(self._shares[name] for name in names[names.index(self._name) + 1 :])
        for name, seconds in self.seconds.items():  # what an earlier run did is in neither
            if name in self._shares:
                spent_s, done = spent_s + seconds, done + self._shares[name]
        return spent_s * left / done if done >= 0.01 else None

    def close(self) -> None:
        """End the last stage and leave the terminal as it was."""
        self._end()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _told_left(self) -> str:
        left_s = self.seconds_left()
        return "" if left_s is None or left_s < 1 else f"about {format_seconds(left_s)} left in all"

    def _end(self) -> None:
        if not self._name:
            return
        self.seconds[self._name] = time.monotonic() - self._begin_s
        if self._bar is not None:
            if self._total is None:
                self._bar.update(self._task, total=1, completed=1)
            self._bar.update(self._task, left="")
            self._bar.stop_task(self._task)
        elif self.enabled:
            print(f"demo model: {self._name} took {self.seconds[self._name]:.0f} s", file=sys.stderr, flush=True)
        self._name = ""


def _rich_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(24),  # beside the time left, in 80 columns
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    return Progress(*columns, console=Console(stderr=True))
