"""Measurements that take turns: cases, ratios round by round, and their writing."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

QUIET_SHARE = 0.1  # of all cores: others take no more in a quiet round


class Case(NamedTuple):
    """Something to time.

    Args:
        name: of the row or column.
        run: one measurement.
        num_bytes: of weights read by it.
        count: matrices or walks in it.
    """

    name: str
    run: Callable[[], None]
    num_bytes: int
    count: int = 1


def take_turns(cases: list[Case], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each case in each round, after one run of each to warm up."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases:
            begin = time.perf_counter()
            case.run()
            if turn:
                times[case.name].append(time.perf_counter() - begin)
    return times


def spread(values: list[float]) -> dict:
    """Return median, least, greatest and number of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def quotients(a: list[float], b: list[float]) -> dict:
    """Return the spread of a / b, round by round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def quiet_ratio(a: list[float], b: list[float], others: list[float]) -> dict | None:
    """Return the spread of a / b over the rounds in which other processes took little; None without such a round.

    Args:
        a, b: of each round.
        others: the larger share of the processors that others took during a and b, of each round.
    """
    pairs = [(x, y) for x, y, share in zip(a, b, others, strict=True) if share <= QUIET_SHARE]
    return quotients(*map(list, zip(*pairs, strict=True))) if pairs else None


def ranged(found: dict | None, unit: float, width: int, digits: int) -> str:
    """Write a median and its range."""
    if found is None:
        return "-"
    middle, least, most = (f"{unit * found[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle:>{width}} ({least} to {most})"
