"""The replay of speculation runs on real routes."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_a_short_replay_prints_each_way_against_none(data_folder):
    asked = ["--data", str(data_folder), "--tokens", "70", "--cache", "25", "--links", "12", "--acceptance", ".8"]
    script = [sys.executable, str(ROOT / "scripts" / "replay_speculation.py")]
    result = subprocess.run([*script, *asked], capture_output=True, text=True, check=True)
    (ways,) = json.loads(result.stdout.splitlines()[-1]).values()
    assert {*ways} == {"none", "always three", "acceptance", "foreseen", "true"}
    assert all(one["tokens_per_s"] > 0 for one in ways.values())
    assert ways["none"]["drafted_per_token"] == 0 < ways["always three"]["drafted_per_token"]
