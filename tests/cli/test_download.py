"""`moeflow download`, and what the commands that are given a hub id tell before they fetch it."""

import json
import os
import subprocess
import sys

import pytest

from helpers.hub_server import ID, hub
from helpers.machine_profiles import small_profile
from helpers.paths import ROOT
from moeflow.machine.identity import disk_of, hardware
from moeflow.machine.store import keep_profile
from moeflow.paths import cache_folder


@pytest.fixture
def served(speaking_folder):
    with hub({file.name: file for file in speaking_folder.iterdir() if file.is_file()}) as found:
        yield found


def environment(served, tmp_path, **more):
    return os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")} | more


def moeflow(served, tmp_path, *arguments):
    command = [sys.executable, "-m", "moeflow", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(served, tmp_path), stdin=subprocess.DEVNULL
    )


def test_download_prints_what_it_fetched_and_where(served, tmp_path):
    run = moeflow(served, tmp_path, "download", ID, "--to", str(tmp_path / "model"), "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["folder"] == str(tmp_path / "model")
    assert found["fetched_bytes"] == found["num_bytes"] > 0
    again = json.loads(moeflow(served, tmp_path, "download", ID, "--to", str(tmp_path / "model"), "--json").stdout)
    assert again["fetched_bytes"] == 0


@pytest.mark.slow
def test_an_id_is_planned_before_it_is_fetched_and_not_again_when_it_is_there(served, tmp_path):
    keep_profile(small_profile(hardware=hardware(), disk=disk_of(cache_folder())))
    first = moeflow(served, tmp_path, "generate", ID, "ab", "--max-new-tokens", "2")
    assert first.returncode == 0, first.stderr
    assert f"reading the headers of {ID} from the hub" in first.stderr
    assert "and decodes about" in first.stderr
    assert "moeflow chat org/model" in first.stderr
    second = moeflow(served, tmp_path, "generate", ID, "ab", "--max-new-tokens", "2")
    assert second.returncode == 0, second.stderr
    assert "decodes about" not in second.stderr
    assert second.stdout == first.stdout
