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
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _progress(title, DownloadColumn(), TransferSpeedColumn()) as show:
        yield show


@contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many things are done.

    Args:
        title: what is being done.

    Yields:
        A function of (things done, things in all).
    """
    from rich.progress import MofNCompleteColumn

    with _progress(title, MofNCompleteColumn()) as show:
        yield show


@contextmanager
def _progress(title: str, *figures) -> Iterator[Callable[[int, int], None]]:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(title), BarColumn(), *figures, TimeRemainingColumn())
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
