"""Triton kernels, in a process of their own: the interpreter must be switched on before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton (pip install 'triton>=3.6')"
)


def run_claims(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_every_claim_of_triton_claims_holds():
    run = run_claims("tests/triton_claims.py")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
