"""Streamed answers on the terminal: plain text or rendered markdown, block by block.

Knows nothing about models: works on an iterator over text, and keeps the terminal safe from what the text says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from markdown_it.token import Token
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from moeflow.chat.stop_flag import StopFlag

# Control characters other than tab and newline: a model may say them, a terminal must not act on them.
_CONTROL_CHARACTERS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Screen:
    """Where answers and notes go: rendered markdown on a capable terminal, plain text elsewhere.

    Args:
        stdout: where they are written.
        plain: True for text without markup or colour; None decides by the terminal and NO_COLOR.
    """

    def __init__(self, stdout: TextIO, plain: bool | None = None) -> None:
        from rich.console import Console

        if plain is None:
            plain = not stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
        self.plain = plain
        if plain:
            self.console = Console(file=stdout, highlight=False, color_system=None, force_terminal=False)
        else:
            self.console = Console(file=stdout, highlight=False)

    def note(self, text: str, style: str = "dim") -> None:
        """Print a line that is not the model's."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def show(self, pieces: Iterable[str], stop: StopFlag) -> None:
        """Show an answer while it comes, safe for the terminal whatever the model says.

        Args:
            pieces: iterator over the answer's text.
            stop: set once the user has asked for its end.
        """
        safe = _without_control_characters(pieces)
        if self.plain:
            write_pieces(safe, self.console.file)
        else:
            self._show_markdown(safe, stop)

    def _show_markdown(self, pieces: Iterable[str], stop: StopFlag) -> None:
        """Print each block of markdown when it is finished; the one being written is redrawn below them."""
        from rich.console import Group
        from rich.live import Live
        from rich.spinner import Spinner

        spinner = Spinner("dots", "reading the prompt", style="dim")
        rest, printed = "", False

        def window() -> Tail:
            shown: list[RenderableType] = [""] if printed else []
            shown.append(render_markdown(rest) if rest or printed else spinner)
            if stop.is_set():
                shown.append("[dim]stopping after this token[/dim]")
            return Tail(Group(*shown))

        def print_blocks(text: str) -> None:
            if printed:
                self.console.print()
            self.console.print(render_markdown(text))

        with Live(console=self.console, get_renderable=window, refresh_per_second=8, transient=True) as live:
            for piece in pieces:
                rest += piece
                if "\n" in piece:
                    finished, rest = split_markdown(rest)
                    if finished:
                        live.refresh()  # or the window still shows what is printed above it now
                        print_blocks(finished)
                        printed = True
        if rest.strip():
            print_blocks(rest)


def write_pieces(pieces: Iterable[str], file: IO[str]) -> None:
    """Write text as it comes, and end its last line; control characters never reach a terminal.

    Args:
        pieces: iterator over the text.
        file: text file. A terminal gets no control character but tab and newline; any other gets the text as it is.
    """
    last = "\n"
    for piece in _without_control_characters(pieces) if file.isatty() else pieces:
        file.write(piece)
        file.flush()
        last = piece or last
    if not last.endswith("\n"):
        file.write("\n")
        file.flush()


def _without_control_characters(pieces: Iterable[str]) -> Iterator[str]:
    return (piece.translate(_CONTROL_CHARACTERS) for piece in pieces)


@contextmanager
def echo_off(terminal: TextIO) -> Iterator[None]:
    """Keep what is typed during an answer out of it: the terminal hands it to the next prompt instead."""
    import termios

    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def render_markdown(text: str) -> RenderableType:
    """Render a model's markdown as it was meant: tags such as <think> stay visible and line breaks stay breaks."""
    from rich.markdown import Markdown

    tokens = _parse_markdown(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    rendered = Markdown("")
    rendered.parsed = tokens
    return _SingleSpaced(rendered)


def split_markdown(text: str) -> tuple[str, str]:
    """Split streamed markdown into the blocks that more text cannot change, and the rest.

    Args:
        text: markdown of which the end has not arrived.

    Returns:
        `(finished, rest)`; both together are `text`.
    """
    complete_lines = text[: text.rfind("\n") + 1]
    begins = [token.map[0] for token in _parse_markdown(complete_lines) if token.level == 0 and token.map]
    last = max(begins, default=0)
    lines = text.split("\n")
    return "".join(f"{line}\n" for line in lines[:last]), "\n".join(lines[last:])


def _parse_markdown(text: str) -> list[Token]:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)


class _SingleSpaced:
    """Renderable without the blank lines of another that follow a blank line or stand at an end."""

    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        num_blank: int | None = None  # None until the first line that is not blank
        for line in console.render_lines(self.renderable, options.update(height=None), pad=False):
            # A coloured space is not blank: it is the margin of a code block.
            if all(not part.text.strip() and not (part.style and part.style.bgcolor) for part in line):
                num_blank = None if num_blank is None else num_blank + 1
                continue
            if num_blank:
                yield Segment.line()
            num_blank = 0
            yield from line
            yield Segment.line()


class Tail:
    """Renderable that shows the last lines of another, as many as the terminal has room for.

    Args:
        renderable: what is shown.
        num_reserved_lines: lines of the terminal to leave free.
    """

    def __init__(self, renderable: RenderableType, num_reserved_lines: int = 1) -> None:
        self.renderable = renderable
        self.num_reserved_lines = num_reserved_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        lines = console.render_lines(self.renderable, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - self.num_reserved_lines) :]:
            yield from line
            yield Segment.line()
