"""The report's file: replaced whole after every row, so that a run that is cut keeps what it has."""

import json
import time
from pathlib import Path
from typing import Any

from moeflow.atomic_file import write_atomically

OK, FAILED, TIMED_OUT = "ok", "failed", "timed out"
SKIPPED, UNAVAILABLE, INTERRUPTED, RUNNING = "skipped", "unavailable", "interrupted", "running"


class Report:
    """What is known so far.

    Args:
        path: of the JSON file.
        options: of the run.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self._begin = time.monotonic()
        self.content: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "options": options,
            "finished": False,
            "seconds": 0.0,
            "steps": [],
        }
        self.save()

    def begin(self, name: str, case: dict[str, Any], status: str = RUNNING, error: str | None = None) -> dict[str, Any]:
        """Enter a run of a step; return its entry."""
        entry = {"step": name, "case": case, "status": status, "seconds": 0.0, "error": error, "facts": {}, "rows": []}
        self.content["steps"].append(entry)
        self.save()
        return entry

    def add(self, entry: dict[str, Any], told: dict[str, Any]) -> None:
        """Put what a step told into its entry: {"row": ...} or {"facts": ...}."""
        entry["facts"] |= told.get("facts", {})
        entry["rows"] += [told["row"]] if "row" in told else []
        self.save()

    def end(self, entry: dict[str, Any], status: str, seconds: float, error: str | None = None) -> None:
        """Say how a run of a step ended."""
        entry |= {"status": status, "seconds": round(seconds, 1), "error": error}
        self.save()

    def finish(self) -> None:
        """Say that every step had its turn."""
        self.content["finished"] = True
        self.save()

    def count(self, *statuses: str) -> int:
        """Return how many runs have one of these statuses."""
        return sum(entry["status"] in statuses for entry in self.content["steps"])

    def save(self) -> None:
        """Replace the file.

        Raises:
            MoeflowError: it cannot be written; the file is as it was.
        """
        self.content["seconds"] = round(time.monotonic() - self._begin, 1)
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")
