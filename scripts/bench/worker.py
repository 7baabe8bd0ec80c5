"""An engine in a process of its own that decodes when it is asked, as its parent sees it."""

import json
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


class Worker:
    """One engine in a process of its own.

    Args:
        python: that runs it.
        job: of step_worker.py.
    """

    def __init__(self, python: str, job: dict) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(job["threads"]))
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [python, str(HERE / "step_worker.py"), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.name = job["name"]
        self.ready = self._answer()

    def decode(self, num_tokens: int) -> dict:
        """Return the worker's answer to one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_tokens}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Wait until the process is gone."""
        self._process.communicate()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}; run its job by hand to see why")
        return json.loads(line)
