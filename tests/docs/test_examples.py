"""Each program in docs/examples runs on a model folder given as its argument."""

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
SAID = {
    "generate": "hit rate",
    "engine_batch": "new tokens",
    "chat_stream": "",
    "record_trace": "belady at 50 %: hit rate",
    "plan_placement": "joint: imbalance",
    "predictor": "sequence: ",
    "quantize": "bits a weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, speaking_folder, tmp_path):
    command = [sys.executable, str(path), str(speaking_folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert run.returncode == 0, f"{path.name}: {run.stderr[-2000:]}"
    assert SAID[path.stem] in run.stdout, f"{path.name} printed {run.stdout!r}"
    assert run.stdout.strip()
    assert not list(tmp_path.iterdir()), f"{path.name} left files behind"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_in_the_index(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 36, f"{path.name} has {len(lines)} lines"
    assert f"examples/{path.name}" in (ROOT / "docs" / "index.md").read_text(), f"docs/index.md lacks {path.name}"
