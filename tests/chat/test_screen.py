"""Markdown that arrives in pieces, and text that must not drive the terminal it is shown on."""

import os
import pty
import random
import select
import tty
from contextlib import contextmanager
from io import StringIO

import pytest
from rich.console import Console

from moeflow.chat.screen import Screen, Tail, render_markdown, split_markdown, write_pieces
from moeflow.chat.stop_flag import StopFlag


def printed(renderable, width=100):
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def test_tags_and_line_breaks_of_a_model_stay_visible():
    text = printed(render_markdown("<think>\nfirst\nsecond\n\n</think>\n\nDone."))
    assert [line.rstrip() for line in text.splitlines()] == ["<think>", "first", "second", "", "</think>", "", "Done."]


DOCUMENT = """# Title

A paragraph of
two lines.

1. one

   with a second paragraph

2. two
   - nested

| a | b |
|---|---|
| 1 | 2 |

```python
x = 1

y = 2
```

The end: a line separator \u2028 inside, and **bold**."""


def test_finished_blocks_of_streamed_markdown_render_like_the_whole():
    whole = printed(render_markdown(DOCUMENT))
    for seed in range(5):
        rng = random.Random(seed)
        finished, rest, begin = [], "", 0
        while begin < len(DOCUMENT):
            end = begin + rng.randint(1, 9)
            rest += DOCUMENT[begin:end]
            begin = end
            done, rest = split_markdown(rest)
            finished += [done] if done else []
        assert "".join(finished) + rest == DOCUMENT
        assert len(finished) >= 4
        in_pieces = "\n".join(printed(render_markdown(block)) for block in [*finished, rest])
        assert in_pieces == whole


def test_open_code_block_is_not_finished():
    assert split_markdown("```\na\n\nb\n\n# c\n") == ("", "```\na\n\nb\n\n# c\n")


def test_tail_keeps_the_last_lines_that_fit():
    out = StringIO()
    console = Console(file=out, width=20, height=4, color_system=None)
    console.print(Tail("\n".join(str(number) for number in range(50))))
    assert out.getvalue().split() == ["47", "48", "49"]


HOSTILE = ["a\tb\r\n", "\x1b]0;title\x07", "\x1b", "[2Jc\x08", "\x9b31m\x7f", "d é 😀", "\x00"]
HARMLESS = "a\tb\n]0;title[2Jc31md é 😀\n"


@contextmanager
def raw_terminal():
    """Yield a text file that is a terminal, and a function that reads what was written to it up to some text."""
    master, slave = pty.openpty()
    tty.setraw(slave)  # or the terminal itself would turn newlines into \r\n

    def read_until(end):
        received = b""
        while not received.endswith(end.encode()):
            assert select.select([master], [], [], 20)[0], f"no {end!r} after {received!r}"
            received += os.read(master, 65536)
        return received.decode()

    try:
        with open(slave, "w", encoding="utf-8", newline="") as file:
            yield file, read_until
    finally:
        os.close(master)


def test_terminal_gets_no_control_character():
    with raw_terminal() as (file, read_until):
        write_pieces(HOSTILE, file)
        assert read_until("😀\n") == HARMLESS


def test_pieces_reach_the_terminal_one_by_one():
    with raw_terminal() as (file, read_until):

        def pieces():
            yield "a"
            assert read_until("a") == "a"
            yield "\x1b"
            yield "b"
            assert read_until("b") == "b"

        write_pieces(pieces(), file)
        assert read_until("\n") == "\n"


def test_pipe_gets_every_byte():
    reader, writer = os.pipe()
    with open(reader, "rb") as received:
        with open(writer, "w", encoding="utf-8", newline="") as file:
            write_pieces(HOSTILE, file)
        assert received.read() == "".join([*HOSTILE, "\n"]).encode()


def test_plain_screen_gets_no_control_character_even_in_a_file():
    out = StringIO()
    Screen(out, plain=True).show(iter(HOSTILE), StopFlag())
    assert out.getvalue() == HARMLESS


@pytest.mark.parametrize(
    ("environment", "plain"),
    [({"TERM": "xterm"}, False), ({"TERM": "dumb"}, True), ({}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, True)],
)
def test_screen_is_plain_where_the_terminal_asks_for_it(monkeypatch, environment, plain):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with raw_terminal() as (file, _):
        assert Screen(file).plain is plain
    assert Screen(StringIO()).plain
