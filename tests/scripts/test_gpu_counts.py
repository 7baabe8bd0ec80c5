"""A layer whose experts are resident asks a GPU host for nothing, or, where it is predicted, for its routes alone."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytest.importorskip("triton")


def _run(*arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "gpu_counts.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_layer_waits_for_nothing_copies_nothing_and_launches_two_kernels():
    done = _run("--rounds", "2", "--layers", "3", "--tokens", "1,16")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    nothing = {"host waits": 0, "kernels": 2, "copies": 0, "async copies": 0}
    assert found["layers"] == {"1": nothing, "16": nothing}
    # Predicted: the routes come down in one copy, for which the host waits once the layer is launched.
    routes = {"host waits": 1, "copies": 0, "async copies": 1}
    assert found["predicted"] == {
        name: {tokens: {**routes, "kernels": kernels} for tokens in ("1", "16")}
        for name, kernels in (("markov", 5), ("lookahead", 13))
    }
    assert max(found["kernels"].values()) == 12


@pytest.mark.slow
def test_more_tokens_than_kernels_look_up_for_are_no_step():
    done = _run("--rounds", "1", "--layers", "1", "--tokens", "17", "--no-kernels")
    assert done.returncode != 0
    assert "NotTrustedError" in done.stderr
