"""`moeflow doctor` as a user types it: its page, its JSON, its exit codes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.machine.profile import MachineProfile
from moeflow.machine.store import kept_profile

pytestmark = pytest.mark.torch  # without torch the doctor rightly says that moeflow does not work


def doctor(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moeflow", "doctor", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def test_the_page_of_this_machine():
    run = doctor()
    assert run.returncode == 0, run.stdout
    assert "kernels" in run.stdout
    assert "cache folder" in run.stdout


def test_json_and_exit_code_where_something_does_not_work(tmp_path):
    (tmp_path / "file").write_text("")
    run = doctor("--json", MOEFLOW_CACHE=str(tmp_path / "file"))
    about = json.loads(run.stdout)
    assert run.returncode == 1
    assert about["works"] is False
    assert about["findings"][0]["name"] == "cache folder"
    assert about["profile"] is None


def test_a_model_that_is_not_here_is_broken_and_not_fetched(capsys):
    assert main(["doctor", "--json", "nobody/nothing"]) == 1
    about = json.loads(capsys.readouterr().out)
    assert about["findings"][0]["name"] == "model"


def test_deep_without_a_model_is_refused(capsys):
    assert main(["doctor", "--deep"]) == 1
    assert "name the model" in capsys.readouterr().err


def test_deep_reads_the_model_and_names_the_fault(speaking_folder, tmp_path, capsys):
    assert main(["doctor", "--deep", str(speaking_folder), "--json"]) == 0
    told = capsys.readouterr()
    assert any(one["name"] == "trial" for one in json.loads(told.out)["findings"])
    assert "100 %" in told.err
    folder = shutil.copytree(speaking_folder, tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["doctor", "--deep", str(folder)]) == 1
    assert file.name in capsys.readouterr().out


@pytest.mark.slow
def test_measure_keeps_a_profile_and_prints_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path))
    assert main(["doctor", "--measure", "--seconds", "0.1", "--json"]) == 0
    told = capsys.readouterr()
    assert MachineProfile.from_dict(json.loads(told.out)["profile"]) == kept_profile()
    assert "100 %" in told.err


@pytest.mark.parametrize("seconds", ["0", "-3", "nan"])
def test_no_time_to_measure_is_refused(seconds, capsys):
    assert main(["doctor", "--measure", "--seconds", seconds]) == 1
    assert "seconds" in capsys.readouterr().err
