"""Launches by what an earlier launch compiled are Triton's own: the same kernel, grid and constants."""

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
def test_kept_launches_are_tritons_own():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "null_card.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "launches agree" in done.stdout
