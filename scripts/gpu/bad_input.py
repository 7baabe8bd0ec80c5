"""What a card can refuse: each case must end in an error of moeflow's, in one line, or in an answer."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.ballast import Ballast
from gpu.models import draw_prompt, generate, loaded
from gpu.worker import Tell

# A copy that fails in the middle cannot be brought about from here: tests/offload imitates it.
_CHILD_S = 60
_NEIGHBOUR = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(free - (256 << 20), 0), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Try each case and go on; the model answers afterwards.

    Raises:
        AssertionError: a case ended in an error that is not moeflow's, or in one of several lines.
    """
    cases: dict[str, Callable[[], object]] = {
        'device="cuda:7"': lambda: answer({**job, "device": "cuda:7"}),
        "no memory for one layer's experts": lambda: answer(job, expert_memory=1000),
        "a card that fails on the way": lambda: in_child({**job, "breaks": job["device"] != "cpu"}),
    }
    if job["device"] != "cpu":
        cases |= {
            "less memory than the dense weights": lambda: with_ballast(job, 300 << 20),
            "memory for the dense weights and little more": lambda: with_ballast(job, 3 << 30),
            "no locked memory allowed": lambda: without_locked_memory(job),
            "pinned memory of a terabyte": lambda: answer(job, host_memory=1 << 40),
            "another process takes the memory after loading": lambda: with_neighbour(job, "25%"),
            "the same, and experts may give some back": lambda: with_neighbour(job, "auto"),
            "Triton's cache folder cannot be written": lambda: in_child(job, TRITON_CACHE_DIR="/dev/null/triton"),
        }
    wrong = []
    for name, attempt in cases.items():
        outcome, is_right = outcome_of(attempt)
        tell({"case": name, "outcome": outcome, "right": is_right})
        wrong += [] if is_right else [f"{name}: {outcome}"]
    tell({"case": "afterwards", "outcome": outcome_of(lambda: answer(job))[0], "right": True})
    assert not wrong, "; ".join(wrong)
    return {"cases": len(cases)}


def outcome_of(attempt: Callable[[], object]) -> tuple[str, bool]:
    """Return what an attempt ended in, and whether that is an answer or an error as moeflow's are."""
    from moeflow.errors import MoeflowError

    try:
        attempt()
    except MoeflowError as error:
        return f"{type(error).__name__}: {error}", "\n" not in str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}", False
    return "answered", True


def answer(job: dict[str, Any], **options: Any) -> list[int]:
    """Load the model and generate a few tokens."""
    with loaded(job, "bfloat16", **{"expert_memory": "25%", "predictor": None, **options}) as model:
        return generate(model, draw_prompt(model, 16), 4)


def in_child(job: dict[str, Any], **environment: str) -> None:
    """Run a model in a process of its own, whose card fails on the way where the job says "breaks".

    Raises:
        RuntimeError: a call raised what it should not; subprocess.TimeoutExpired where one hangs.
    """
    command = [sys.executable, str(Path(__file__).with_name("broken_card.py")), json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_CHILD_S)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip() or done.stderr[-300:]}")


def with_ballast(job: dict[str, Any], left_bytes: int) -> list[int]:
    """Answer where little memory is free."""
    with Ballast(job["device"], left_bytes):
        return answer(job, expert_memory="auto")


def without_locked_memory(job: dict[str, Any]) -> list[int]:
    """Answer under `ulimit -l 0`."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, before[1]))
    try:
        return answer(job)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@contextmanager
def _neighbour() -> Any:
    """Run another process that holds all but 256 MB of what is free."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    try:
        assert process.stdout is not None, "opened as a pipe"
        process.stdout.readline()
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def with_neighbour(job: dict[str, Any], expert_memory: str) -> list[int]:
    """Answer a prompt that needs more memory than another process has left, then a short one."""
    with loaded(job, "bfloat16", expert_memory=expert_memory, predictor=None) as model:
        with _neighbour():
            outcome, is_right = outcome_of(lambda: generate(model, draw_prompt(model, 8192), 2))
        found = generate(model, draw_prompt(model, 16), 4)
    if not is_right:
        raise RuntimeError(f"{outcome}; it answered afterwards")
    return found
