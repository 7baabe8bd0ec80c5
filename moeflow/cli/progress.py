"""Progress of long work on standard error: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from moeflow.formatting import format_bytes, format_seconds
from moeflow.progress import ProgressCallback, ShareCallback

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import ProgressColumn

_LINE_EVERY_S = 60.0  # without a terminal, where a tenth takes longer


class _Show(Protocol):
    """What shows how much is done, and of late also what is going on."""

    def __call__(self, done: int, total: int, text: str = ...) -> None: ...


@contextmanager
def bytes_progress(title: str) -> Iterator[ProgressCallback]:
    """Show how many bytes are done, how many come in a second and how long the rest takes.

    What is done at the first call was done before: it counts for neither rate nor time.

    Args:
        title: what is being done.

    Yields:
        A function of (bytes done, bytes in all).
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _progress(title, DownloadColumn(), TransferSpeedColumn(), tell_rate=True) as show:
        yield show


@contextmanager
def count_progress(title: str) -> Iterator[ProgressCallback]:
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
def share_progress(title: str) -> Iterator[ShareCallback]:
    """Show what share is done and what is going on.

    Args:
        title: what is being done.

    Yields:
        A function of (share done, 0 to 1, what is going on).
    """
    from rich.progress import TextColumn

    with _progress(title, TextColumn("{task.percentage:>3.0f} %")) as show:
        yield lambda share, text: show(round(10_000 * share), 10_000, text)


@contextmanager
def _progress(title: str, *figures: "ProgressColumn", tell_rate: bool = False) -> Iterator[_Show]:
    done_before: int | None = None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Bar(Progress):
            """A bar, and what is going on below it: beside it a narrow terminal would have room for neither."""

            def get_renderables(self) -> "Iterator[RenderableType]":
                yield from super().get_renderables()
                yield from (Text(task.description) for task in self.tasks if task.description != title)

        literal = title.replace("{", "{{").replace("}", "}}")  # a file may be called so
        columns = (TextColumn(literal, markup=False), BarColumn(), *figures, TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)

            def show(done: int, total: int, text: str = title) -> None:
                nonlocal done_before
                if done_before is None:
                    done_before = done
                    bar.reset(task, completed=done, total=total)
                bar.update(task, completed=done, total=total, description=text)

            yield show
    else:
        begin_s = time.monotonic()
        shown_tenth, shown_s = -1, begin_s

        def line(done: int, total: int, text: str = title) -> None:
            nonlocal shown_tenth, shown_s, done_before
            done_before = done if done_before is None else done_before
            now_s, tenth = time.monotonic(), 10 * done // total if total else 10
            if tenth <= shown_tenth and now_s - shown_s < _LINE_EVERY_S:
                return
            shown_tenth, shown_s = max(tenth, shown_tenth), now_s
            parts = [f"{title}: {100 * done // total if total else 100} %"]
            if text != title:
                parts.append(text)
            came, took_s = done - done_before, now_s - begin_s
            if tell_rate and came > 0 and took_s > 0:
                parts.append(f"{format_bytes(round(came / took_s))}/s")
            left_s = took_s * (total - done) / came if came > 0 else 0.0
            if left_s >= 1:
                parts.append(f"about {format_seconds(left_s)} left")
            print(" · ".join(parts), file=sys.stderr, flush=True)

        yield line
