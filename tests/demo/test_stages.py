"""Progress of a build: bars or lines, and the time left."""

import re

import pytest

from moeflow.demo.stages import Stages


def test_progress_is_plain_lines_without_a_terminal_and_silent_when_not_wanted(capsys):
    for enabled in (True, False):
        stages = Stages(enabled)
        stages.start("fetch")
        stages.start("layers", 8)
        for _ in range(8):
            stages.advance()
        stages.close()
        if enabled:
            lines = capsys.readouterr().err.splitlines()
    assert capsys.readouterr() == ("", "")
    assert [line for line in lines if " of " in line] == [f"demo model: layers {n} of 8" for n in (2, 4, 6, 8)]
    assert list(stages.seconds) == ["fetch", "layers"]


def test_time_left_is_told_in_all_by_what_this_run_has_done(capsys):
    stages = Stages(shares={"sample": 0.25, "layers": 0.5, "write": 0.25})
    stages.start("fetch")
    assert stages.seconds_left() is None
    stages.start("layers", 4)
    assert stages.seconds_left() is None, "an earlier run made the sample, and this one has done nothing yet"
    stages.seconds["sample"] = 1000.0
    stages.advance()
    assert stages.seconds_left() == pytest.approx(1000 * 0.625 / 0.375, rel=0.01)
    stages.start("write", 2)
    stages.seconds |= {"layers": 1000.0}
    stages.advance()
    assert stages.seconds_left() == pytest.approx(2000 * 0.125 / 0.875, rel=0.01)
    stages.advance()
    assert stages.seconds_left() == 0
    stages.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if " of " in line]
    for line, told in zip(lines, ("layers 1 of 4, about", "write 1 of 2, about", "write 2 of 2"), strict=True):
        assert re.fullmatch(rf"demo model: {told}( \d+ min \d\d s left in all)?", line)


def test_what_an_earlier_run_did_does_not_make_the_rest_look_short(capsys):
    stages = Stages(shares={"sample": 0.25, "layers": 0.5, "write": 0.25})
    stages.seconds["sample"] = 1000.0
    stages.start("layers", 4)
    stages.repeat()
    stages.repeat()
    assert stages.seconds_left() == pytest.approx(1000 * (0.25 + 0.25) / 0.25, rel=0.01)
    stages.close()
    assert "layers 2 of 4" in capsys.readouterr().err
