"""A step inside its own process: finds its function, and tells what it finds on the standard output it was given."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from gpu.runner import UNAVAILABLE_CODE

Tell = Callable[[dict[str, Any]], None]
# {step: (module in this folder, function)}; a function takes (job, tell) and returns facts.
FUNCTIONS = {
    "card": ("card", "run"),
    "bandwidth": ("bandwidth", "run"),
    "claims": ("commands", "claims"),
    "cuda_tests": ("commands", "cuda_tests"),
    "races": ("commands", "races"),
    "compute_sanitizer": ("commands", "compute_sanitizer"),
    "kernels": ("commands", "kernels"),
    "models": ("models", "run"),
    "end_to_end": ("end_to_end", "run"),
    "bits": ("bits", "run"),
    "small_card": ("small_card", "run"),
    "signals": ("signals", "run"),
    "bad_input": ("bad_input", "run"),
}


class UnavailableError(Exception):
    """This machine lacks what a step needs."""


def work(name: str, job: dict[str, Any]) -> int:
    """Run one step. Returns the exit code.

    Args:
        name: of the step.
        job: its case and the run's options: "device", "dry", "work", "routes", "shape".
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries are no answers

    def send(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    module, function = FUNCTIONS[name]
    try:
        found = importlib.import_module(f"gpu.{module}")
        facts = getattr(found, function)(job, lambda row: send({"row": row}))
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE_CODE
    send({"facts": facts})
    return 0
