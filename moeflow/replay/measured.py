"""Figures measured with prediction and prefetch, as a benchmark wrote them, for a report to show beside replays."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from moeflow.errors import ConfigError


class Realised(NamedTuple):
    """Measured figures, as the file of `--realised` holds them.

    Args:
        rows: policy, residency (percent) and hit_rate of each.
        recall_by_distance: predictor -> layers ahead -> recall.
        wasted_bytes: policy -> bytes prefetched for nothing.
        timeliness: policy -> share of the useful prefetches that arrived before they were needed.
    """

    rows: list[dict]
    recall_by_distance: dict[str, dict]
    wasted_bytes: dict[str, float]
    timeliness: dict[str, float]


def read_realised(path: str | Path) -> Realised:
    """Read measured rows: a JSON list of them, or an object of rows and the sections of `Realised`.

    Raises:
        ConfigError: the file is missing or not of this form; the message names the place.
    """
    try:
        content = json.loads(Path(path).read_bytes())  # with or without a byte-order mark
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a JSON file of measured rows.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. Give a JSON file of measured rows.") from error
    content = {"rows": content} if isinstance(content, list) else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}. Allowed: a list of rows, or an object with rows.")
    rows = content.get("rows", [])
    if not isinstance(rows, list):
        raise ConfigError(f"rows of {path} is a {type(rows).__name__}. Give a list.")
    for number, row in enumerate(rows):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("policy"), str)
            and _is_number(row.get("residency"), 100)
            and _is_number(row.get("hit_rate"), 1)
        ):
            raise ConfigError(
                f"row {number} of {path} is {str(row)[:80]}. A row has policy (a name), residency (percent) and "
                "hit_rate (0 to 1)."
            )
    recall = _named(path, content, "recall_by_distance", nested=True)
    for name, by_distance in recall.items():
        if not by_distance or not all(str(d).isdigit() and _is_number(v, 1) for d, v in by_distance.items()):
            raise ConfigError(f"recall_by_distance of {name!r} in {path} must map layers ahead to a recall of 0 to 1.")
    wasted = _named(path, content, "wasted_bytes")
    timeliness = _named(path, content, "timeliness")
    for section, values, most in (("wasted_bytes", wasted, math.inf), ("timeliness", timeliness, 1)):
        if not all(_is_number(value, most) for value in values.values()):
            raise ConfigError(f"{section} in {path} must hold numbers from 0 to {most:g}, found {str(values)[:80]}.")
    return Realised(rows, recall, wasted, timeliness)


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _named(path: str | Path, content: dict, section: str, *, nested: bool = False) -> dict:
    """Return a section as name -> value; a value without a name stands for all."""
    value = content.get(section)
    if value is None:
        return {}
    named = isinstance(value, dict) and (not nested or all(isinstance(part, dict) for part in value.values()))
    if nested and not isinstance(value, dict):
        raise ConfigError(f"{section} in {path} is a {type(value).__name__}. It maps layers ahead to a recall.")
    return value if named else {"all": value}
