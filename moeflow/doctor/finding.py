"""What a check found: how bad it is, what is wrong, what to do.

Knows texts and their order. Knows nothing of machines or models.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

BROKEN, HARMFUL, FINE = LEVELS = ("broken", "harmful", "fine")


class Finding(NamedTuple):
    """One line of the doctor's page.

    Args:
        name: what was looked at.
        found: what was there.
        level: "broken" (something does not work), "harmful" (it works, but worse than it could) or "fine".
        wrong: what is wrong with it; empty where it is fine.
        remedy: what to do about it.
    """

    name: str
    found: str
    level: str = FINE
    wrong: str = ""
    remedy: str = ""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by how bad they are; those of one level stay in order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def works(findings: Iterable[Finding]) -> bool:
    """Tell whether nothing is broken."""
    return all(finding.level != BROKEN for finding in findings)


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return what `moeflow doctor --json` prints of findings."""
    ordered = worst_first(findings)
    return {"works": works(ordered), "findings": [finding._asdict() for finding in ordered]}
