"""Progress: figures that fit a narrow terminal, and lines now and then elsewhere."""

import io
import re
import sys

import pytest

from moeflow.cli import progress
from moeflow.cli.progress import share_progress

FIGURES = "512 of 1,000 done · 131,072 tok · 12.3 tok/s · hit rate 51 % · 1,214 experts a step"


class Clock:
    """The time, set by hand."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_comes_with_each_tenth_and_each_minute(clock, capsys):
    with share_progress("in.jsonl") as show:
        for second in range(0, 601, 10):
            clock.now_s = second
            show(min(second, 200) / 2000, f"{second} s")
    shown = [line.split(" · ")[:2] for line in capsys.readouterr().err.splitlines()]
    shares = {0: 0, 60: 3, 120: 6, 180: 9, 200: 10}
    assert shown[:5] == [[f"in.jsonl: {share} %", f"{second} s"] for second, share in shares.items()]
    assert [what for _, what in shown[5:]] == [f"{second} s" for second in range(260, 601, 60)]


def test_a_line_tells_the_time_left_once_it_can_be_known(clock, capsys):
    with share_progress("in.jsonl") as show:
        show(0.0, "begun")
        clock.now_s = 90
        show(0.25, "going on")
        show(1.0, "ended")
    assert capsys.readouterr().err.splitlines() == [
        "in.jsonl: 0 % · begun",
        "in.jsonl: 25 % · going on · about 4 min 30 s left",
        "in.jsonl: 100 % · ended",
    ]


class Terminal(io.StringIO):
    """Standard error as a person sees it."""

    def isatty(self):
        return True


@pytest.mark.parametrize("title", ["in.jsonl", "a[1]{2}.jsonl"])
def test_in_a_narrow_terminal_bar_and_figures_have_a_line_each(monkeypatch, title):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    with share_progress(title) as show:
        show(0.4, FIGURES)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert any(line.startswith(title) and "40 %" in line for line in lines)
    assert FIGURES in " ".join(lines), "nothing of the figures is cut off"
