"""Ctrl-C while a model loads, works or is released: nothing is left behind, and what was begun can be finished."""

import subprocess
import sys
import threading

import pytest

from helpers.paths import ROOT
from moeflow import load_moe


@pytest.mark.slow
def test_an_interrupt_in_any_phase_leaves_nothing_behind(speaking_folder):
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "interrupted_lives.py", speaking_folder, "8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == ""


def test_threads_come_with_the_first_read(mixtral_folder):
    before = threading.active_count()
    with load_moe(mixtral_folder, device="cpu", expert_memory="50%").moeflow:
        assert threading.active_count() == before
