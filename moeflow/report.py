"""How things read in a terminal: bytes, seconds, the line after an answer, a model's counters, streamed markdown.

Works on plain numbers, on text, and on the dict `model.moeflow.stats()` returns; imports neither torch nor a model.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from moeflow.answer import Answer

PHASES = ("prefill", "decode")
COUNTERS = (
    "tokens", "forwards", "hits", "misses", "evictions", "bytes_from_disk", "bytes_from_host", "stall_s", "compute_s",
)  # fmt: skip
MISSING = "–"
# What a model may say but a terminal must not act on: control characters other than tab and newline.
_CONTROL_CHARACTERS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def format_bytes(num_bytes: int | None) -> str:
    """Write a size in the largest binary unit that keeps it at 1 or more, such as "318 MiB" or "1.2 GiB"."""
    if num_bytes is None:
        return MISSING
    if num_bytes < 1024:
        return f"{num_bytes} B"
    value, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    # Rounded, because 1023.7 would read "1024 KiB".
    while round(value) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    text = f"{value:.1f}" if round(value, 1) < 100 else f"{value:.0f}"
    return f"{text.removesuffix('.0')} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """Write a duration with two or three digits that matter, such as "41 ms", "0.41 s" or "2 min 05 s"."""
    if seconds is None:
        return MISSING
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_percent(share: float | None) -> str:
    """Write a share of 1 as whole percent, such as "71 %"."""
    return MISSING if share is None else f"{share * 100:.0f} %"


def stats_delta(before: dict, after: dict) -> dict:
    """Return what happened between two `stats()`: counters as differences, memory as it is now.

    Args:
        before: `model.moeflow.stats()` at the start.
        after: the same, at the end.
    """
    delta = {**after, "io": {**after["io"]}}
    for phase in PHASES:
        counted = {name: after[phase][name] - before[phase][name] for name in COUNTERS}
        lookups = counted["hits"] + counted["misses"]
        counted["hit_rate"] = counted["hits"] / lookups if lookups else None
        delta[phase] = counted
    for name in ("reads", "bytes"):
        delta["io"][name] -= before["io"][name]
    return delta


def answer_figures(before: dict | None, after: dict | None, answer: Answer) -> dict:
    """Return an answer and what it cost as one dict that `json.dumps` takes.

    Args:
        before: `model.moeflow.stats()` before the answer; None for a model that runs without moeflow.
        after: the same after it.
        answer: the answer.
    """
    figures = asdict(answer)
    figures["moeflow"] = None if before is None or after is None else stats_delta(before, after)
    return figures


def stats_line(before: dict | None, after: dict | None, answer: Answer) -> str:
    """Write the line that stands below an answer.

    Args:
        before: `model.moeflow.stats()` before the answer; None for a model that runs without moeflow.
        after: the same after it.
        answer: the answer.
    """
    parts = [f"{answer.num_new_tokens} tok"]
    if answer.tokens_per_s is not None:
        rate = answer.tokens_per_s
        parts.append(f"{rate:.1f} tok/s" if rate < 100 else f"{rate:.0f} tok/s")
    parts.append(f"TTFT {format_seconds(answer.ttft_s)}")
    if before is not None and after is not None:
        delta = stats_delta(before, after)
        memory = delta["memory"]
        if delta["decode"]["hit_rate"] is not None:
            parts.append(f"hit rate {format_percent(delta['decode']['hit_rate'])} (decode)")
        parts.append(f"{format_bytes(delta['io']['bytes'])} read")
        held, everything = format_bytes(memory["device_bytes"]), format_bytes(memory["all_experts_bytes"])
        parts.append(f"experts {held} of {everything}")
        if memory["host_bytes"]:
            parts.append(f"host {format_bytes(memory['host_bytes'])}")
        parts.append(f"process {format_bytes(memory['process_bytes'])}")
    if answer.stopped == "user":
        parts.append("stopped")
    elif answer.stopped == "length":
        parts.append("length limit reached")
    return " · ".join(parts)


def stats_table(stats: dict) -> Table:
    """Lay `model.moeflow.stats()` out as a table: the counters of prefill and decode, then the memory."""
    from rich import box
    from rich.table import Table

    title = f"{stats['slots']} slots on {stats['device']} · {stats['num_experts']} experts · policy {stats['policy']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in ("", *PHASES):
        table.add_column(heading, justify="right" if heading else "left")
    counters = [
        ("tokens", "tokens", "{:,}".format),
        ("forwards", "forwards", "{:,}".format),
        ("hit rate", "hit_rate", format_percent),
        ("hits", "hits", "{:,}".format),
        ("misses", "misses", "{:,}".format),
        ("evictions", "evictions", "{:,}".format),
        ("read from disk", "bytes_from_disk", format_bytes),
        ("copied from host", "bytes_from_host", format_bytes),
        ("waiting for experts", "stall_s", format_seconds),
        ("computing experts", "compute_s", format_seconds),
    ]
    for label, name, write in counters:
        table.add_row(label, *(write(stats[phase][name]) for phase in PHASES))
    table.add_section()
    table.add_row("", "now", "peak", style="bold")
    memory, io = stats["memory"], stats["io"]
    for label, name in (("device experts", "device"), ("host experts", "host"), ("process", "process")):
        table.add_row(label, format_bytes(memory[f"{name}_bytes"]), format_bytes(memory[f"{name}_peak_bytes"]))
    table.add_row("staging", format_bytes(memory["staging_bytes"]), "")
    table.add_section()
    budget, everything = format_bytes(memory["expert_budget_bytes"]), format_bytes(memory["all_experts_bytes"])
    table.add_row("expert budget", budget, f"of {everything}")
    table.add_row(f"{io['mode']} reads, {io['threads']} threads", f"{io['reads']:,}", format_bytes(io["bytes"]))
    return table


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


def _parse_markdown(text):
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)


class _SingleSpaced:
    """Renderable without the blank lines of another that follow a blank line or stand at an end."""

    def __init__(self, renderable):
        self.renderable = renderable

    def __rich_console__(self, console, options):
        from rich.segment import Segment

        num_blank = None  # None until the first line that is not blank
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

    def __init__(self, renderable: RenderableType, num_reserved_lines: int = 1):
        self.renderable = renderable
        self.num_reserved_lines = num_reserved_lines

    def __rich_console__(self, console, options):
        from rich.segment import Segment

        lines = console.render_lines(self.renderable, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - self.num_reserved_lines) :]:
            yield from line
            yield Segment.line()


class Screen:
    """Where answers and notes go: rendered markdown on a capable terminal, plain text elsewhere."""

    def __init__(self, stdout, plain: bool):
        from rich.console import Console

        self.plain = plain
        options = {"color_system": None, "force_terminal": False} if plain else {}
        self.console = Console(file=stdout, highlight=False, **options)

    def note(self, text: str, style: str = "dim") -> None:
        """Print a line that is not the model's."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def show(self, pieces, stop_event: threading.Event) -> None:
        """Show an answer while it comes, safe for the terminal whatever the model says.

        Args:
            pieces: iterator over the answer's text.
            stop_event: set once the user has asked for its end.
        """
        safe = (piece.translate(_CONTROL_CHARACTERS) for piece in pieces)
        if self.plain:
            write_pieces(safe, self.console.file)
        else:
            self._show_markdown(safe, stop_event)

    def _show_markdown(self, pieces, stop_event):
        """Print each block of markdown when it is finished; the one being written is redrawn below them."""
        from rich.console import Group
        from rich.live import Live
        from rich.spinner import Spinner

        spinner = Spinner("dots", "reading the prompt", style="dim")
        rest, printed = "", False

        def window():
            shown = [""] if printed else []
            shown.append(render_markdown(rest) if rest or printed else spinner)
            if stop_event.is_set():
                shown.append("[dim]stopping after this token[/dim]")
            return Tail(Group(*shown))

        def print_blocks(text):
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


def write_pieces(pieces, file) -> None:
    """Write text as it comes, and end its last line."""
    last = "\n"
    for piece in pieces:
        file.write(piece)
        file.flush()
        last = piece or last
    if not last.endswith("\n"):
        file.write("\n")
        file.flush()
