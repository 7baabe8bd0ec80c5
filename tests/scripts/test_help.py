"""Every script says how it is used, from a fresh process in any folder."""

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MAX_LINES = 350


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_prints_its_help(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert f"usage: {script.name}" in run.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda file: file.stem)
def test_no_script_is_long(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES
