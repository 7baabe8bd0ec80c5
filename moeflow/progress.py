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
def share_progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """Show what share is done and what is going on.

    Args:
        title: what is being done.

    Yields:
        A function of (share done, 0 to 1, what is going on).
    """
    from rich.progress import TextColumn

    with _progress(title, TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}")) as show:
        yield lambda share, text: show(round(1000 * share), 1000, text)


@contextmanager
def _progress(title: str, *figures) -> Iterator[Callable[[int, int], None]]:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(title), BarColumn(), *figures, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, text=title: bar.update(task, completed=done, total=total, description=text)
    else:
        shown = [-1]

        def line(done: int, total: int, text: str = title) -> None:
            tenth = 10 * done // total if total else 10
            if tenth > shown[0]:
                shown[0] = tenth
                print(f"{text}: {10 * tenth} %", file=sys.stderr)

        yield line
