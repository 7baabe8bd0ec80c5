"""What the Triton kernels need on cards that are not here, in a process of its own without the interpreter."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


def compiled(*arguments):
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "tests/helpers/triton_compile.py", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def test_a_model_compiles_few_kernels_and_some_of_them_keep_the_limits_of_every_card():
    done = compiled("--one-of", "48")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"models compile \d+ kernels at most, allowed 12", done.stdout)


@pytest.mark.slow
def test_more_of_the_kernels_keep_the_limits_of_every_card():
    done = compiled("--one-of", "24")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for arch in (86, 89, 90, 120):
        assert f"sm_{arch} " in done.stdout
    assert ", tensor cores" in done.stdout
