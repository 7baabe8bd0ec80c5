"""Where Triton cannot compile as it runs, a first kernel notices, and PyTorch's own take over with one warning."""

import importlib.util
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton"),
]


def tried(tmp_path, case="", **variables):
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "new")}
    environment.update(variables)
    run = subprocess.run(
        [sys.executable, "tests/helpers/triton_probe.py", case],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [line for line in run.stdout.splitlines() if line]


def test_a_kernel_that_runs_is_used_without_a_word(tmp_path):
    assert tried(tmp_path) == ["reason: None", "used: [True, True]"]


@pytest.mark.parametrize(
    ("case", "variables", "found", "advice"),
    [
        ("", {"CC": "/nowhere/cc"}, "there is no C compiler (/nowhere/cc)", "Install gcc, or name one in CC"),
        ("", {"PATH": "/nowhere"}, "there is no C compiler (gcc)", "Install gcc, or name one in CC"),
        ("no Python.h", {}, "Python.h is not in /nowhere", "Install Python's headers"),
        ("", {"TRITON_CACHE_DIR": "/dev/null/triton"}, "Triton's cache folder /dev/null/triton cannot be written", ""),
        ("", {"CC": "false"}, "a first kernel failed: CalledProcessError", "Update Triton and the GPU's driver"),
        ("wrong result", {}, "gave 7 instead of 1", "Update Triton and PyTorch"),
    ],
)
def test_what_is_missing_is_said_once_and_pytorch_takes_over(tmp_path, case, variables, found, advice):
    reason, warning, used = tried(tmp_path, case, **variables)
    assert found in reason
    assert advice in reason
    assert reason.removeprefix("reason: ") in warning
    assert used == "used: [False, False]"
