"""Progress of long work on standard error: a bar in a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many bytes are done.

    Args:
        title: what is being done.

    Yields:
        A function of (bytes done, bytes in all).
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        shown = [-1]

        def line(done: int, total: int) -> None:
            tenth = 10 * done // total if total else 10
            if tenth > shown[0]:
                shown[0] = tenth
                print(f"{title}: {10 * tenth} %", file=sys.stderr)

        yield line
