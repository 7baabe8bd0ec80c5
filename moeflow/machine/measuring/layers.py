"""What a layer of a decode step takes beside its weights, measured in a process of its own.

Loading a model is the work of a later room, and a new process shows what memory such a process takes. Knows its JSON.
"""

import json
import subprocess
import sys
from typing import Any

from moeflow.errors import MoeflowError
from moeflow.formatting import brief

_PROGRAM = "moeflow.doctor.layer_times"
_MOST_S = 300  # importing torch and capturing a program come on top of the time that is asked for


def layer_times(seconds: float) -> dict[str, Any]:
    """Measure decode steps of tiny models.

    Args:
        seconds: for the steps; starting the process comes on top.

    Returns:
        "layer_s" and "step_s", each by "native" (where a program could be captured) and "python"; "process_bytes".

    Raises:
        MoeflowError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", _PROGRAM, f"--seconds={seconds}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_S + seconds)
        if run.returncode == 0:
            return json.loads(run.stdout.splitlines()[-1])
        why = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        why = str(error)
    raise MoeflowError(
        f"a tiny model could not be run to measure its steps ({brief(why, 300)}). Run python -m {_PROGRAM} to see why."
    )
