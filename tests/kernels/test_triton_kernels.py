"""Triton kernels, in processes of their own: the interpreter must be switched on before Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from helpers.paths import ROOT

_HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _HAS_TRITON, reason="needs the package triton (pip install 'triton>=3.6')"),
]


def run(*arguments, interpreted):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpreted))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and `-m gpu`")


@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=[pytest.mark.gpu, _NO_GPU])])
def test_every_claim_of_triton_claims_holds(interpreted):
    # conftest would hide the GPU: this run has no `-m gpu` of its own.
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", "tests/helpers/triton_claims.py")
    done = run(*command, interpreted=interpreted)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_benchmark_checks_itself_under_the_interpreter_and_declines_to_measure_without_a_gpu():
    script = "scripts/bench_triton.py"
    done = run(script, "--check", "--formats", "int4-g64", interpreted=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert '"rows"' in done.stdout.splitlines()[-1]
    if not torch.cuda.is_available():
        refused = run(script, interpreted=False)
        assert refused.returncode == 2
        assert "no GPU here" in refused.stderr
