"""The lanes of the tests: GPUs are hidden unless asked for, files that need torch are known without running them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.lanes import needs_torch, selects
from helpers.paths import ROOT


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ("", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("slow or gpu", True),
        ("not gpu", False),
        ("not slow", False),
        ("slow and not gpu", False),
        ("not (gpu or slow)", False),
        ("not not gpu", True),
        ("gpu and", False),
        ("gpu(1)", False),
    ],
)
def test_a_run_asks_for_a_mark_only_where_it_decides(expression, selected):
    assert selects("gpu", expression) is selected


@pytest.mark.slow
@pytest.mark.parametrize(("options", "seen"), [([], ""), (["-m", "gpu"], "0")])
def test_ordinary_runs_and_the_commands_they_start_see_no_gpu(options, seen, tmp_path):
    (tmp_path / "test_variable.py").write_text(
        "import os, subprocess, sys, pytest\n"
        "@pytest.mark.gpu\n"
        "def test_here(): pass\n"
        "def test_there(): pass\n"
        "print('here', repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
        "code = \"import os; print('there', repr(os.environ['CUDA_VISIBLE_DEVICES']))\"\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    files = ["--confcutdir", str(ROOT), "-p", "conftest", str(tmp_path / "test_variable.py")]
    run = subprocess.run(
        [*command, *options, *files], capture_output=True, text=True, cwd=ROOT / "tests", env=environment
    )
    assert f"here {seen!r}" in run.stdout, run.stdout + run.stderr
    assert f"there {seen!r}" in run.stdout


def test_files_that_need_torch_are_known_by_their_imports(tmp_path):
    def needs(code: str) -> bool:
        file = tmp_path / f"test_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(code)
        return needs_torch(file)

    assert needs("import torch.nn\n")
    assert needs("from safetensors.torch import save_file\n")
    assert needs("from moeflow import load_moe\n")
    assert needs("from helpers.families import FAMILIES\n")
    assert needs("if True:\n    from moeflow.dtypes import TORCH_DTYPES\n")
    assert not needs("from safetensors.numpy import save_file\n")
    assert not needs("from moeflow import MoeflowError\nfrom moeflow.policy.cache import ExpertCache\n")
    assert not needs("def test_it():\n    import torch\n")
    assert not needs("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n")


def test_this_file_needs_no_torch():
    assert not needs_torch(Path(__file__))
