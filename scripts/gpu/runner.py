"""One run of a step in a process of its own, which tells rows as it finds them and is ended in time."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu.report_file import FAILED, OK, TIMED_OUT, UNAVAILABLE

UNAVAILABLE_CODE = 3  # exit code of a step that this machine has no means for
_GRACE_S = 5.0  # between the polite end of a process and its kill
_TAIL = 4000  # characters of standard error that are kept


class Ended(NamedTuple):
    """How a process ended: its status in the report, seconds, and the error with the end of what it printed."""

    status: str
    seconds: float
    error: str | None


def run_step(
    command: list[str], environment: dict[str, str], seconds: float, on_told: Callable[[dict[str, Any]], None]
) -> Ended:
    """Run a process that prints one JSON object a line, and hand each to `on_told` as it comes.

    Args:
        command: the process and its arguments.
        environment: all of it.
        seconds: after which the process and all that it started are ended.
        on_told: takes an object.

    Raises:
        KeyboardInterrupt: as it came; the process has ended by then.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+b") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            in_time = _listen(process, begin + seconds, on_told)
            if not in_time:
                _end(process)
            code = process.wait()
        finally:
            _end(process)
            assert process.stdout is not None, "opened as a pipe"
            process.stdout.close()
        taken = time.monotonic() - begin
        errors.seek(max(errors.seek(0, os.SEEK_END) - _TAIL, 0))
        tail = errors.read().decode(errors="replace").strip()
    if not in_time:
        return Ended(TIMED_OUT, taken, f"ended after {taken:.0f} s\n{tail}")
    if code == UNAVAILABLE_CODE:
        return Ended(UNAVAILABLE, taken, tail.splitlines()[-1] if tail else None)
    if code:
        return Ended(FAILED, taken, f"exit code {code}\n{tail}")
    return Ended(OK, taken, None)


def _listen(process: subprocess.Popen, deadline: float, on_told: Callable[[dict[str, Any]], None]) -> bool:
    """Hand out lines until the process closes its output; return False where the deadline came first."""
    assert process.stdout is not None, "opened as a pipe"
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            found = os.read(process.stdout.fileno(), 1 << 16)
            if not found:
                return True
            *lines, waiting = (waiting + found).split(b"\n")
            for line in lines:
                on_told(json.loads(line))
    return False


def _end(process: subprocess.Popen) -> None:
    """End a process and its group, first by SIGINT."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # what it left behind
        os.killpg(process.pid, signal.SIGKILL)


def one_card(device: str, environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which the card of `device` is the only one, and so `cuda:0`.

    Args:
        device: "cuda" or "cuda:N", N as torch counts in `environment`; or "cpu", which hides all cards.
        environment: left as it is.
    """
    number = int(device.partition(":")[2] or 0)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = str(number) if visible is None else ([*visible.split(","), *[""] * (number + 1)])[number]
    return {**environment, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else names}


def worker_command(script: Path, name: str, job: dict[str, Any]) -> list[str]:
    """Return the command that runs a step."""
    return [sys.executable, str(script), "--worker", name, json.dumps(job)]
