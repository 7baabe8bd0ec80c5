"""The doctor's page as text: findings, worst first; and a measured profile as tables.

Knows findings and profiles. Knows nothing of how they came about.
"""

import textwrap
from collections.abc import Iterable

from moeflow.doctor.finding import BROKEN, FINE, HARMFUL, Finding, worst_first
from moeflow.formatting import format_bytes, format_percent
from moeflow.machine.profile import MachineProfile

_SIGNS = {BROKEN: "[broken]", HARMFUL: "[harmful]", FINE: "[fine]"}
_BUSY = 0.1  # of the processors, from which on a measurement is not to be trusted


def findings_text(findings: Iterable[Finding], width: int = 100) -> str:
    """Lay findings out: first how many there are of each level, then each with what is wrong and what to do.

    Args:
        findings: in any order.
        width: letters of a line.
    """
    ordered = worst_first(findings)
    broken, harmful = (sum(finding.level == level for finding in ordered) for level in (BROKEN, HARMFUL))
    lines = [_summary(broken, harmful), ""]
    for finding in ordered:
        begin = f"{_SIGNS[finding.level]:9} {finding.name}: "
        lines += textwrap.wrap(f"{begin}{finding.found}", width, subsequent_indent=" " * 12)
        for name, text in (("wrong", finding.wrong), ("do", finding.remedy)):
            if text:
                lines += textwrap.wrap(f"{name}: {text}", width, initial_indent=" " * 12, subsequent_indent=" " * 14)
    return "\n".join(lines)


def profile_text(profile: MachineProfile) -> str:
    """Lay a profile out as lines."""
    rows = [
        ("measured on", profile.hardware),
        ("memory, read", _by_number(profile.memory_read, "threads")),
        ("memory, first written", _rate(profile.memory_touch)),
        *((f"an expert's first {name}", _rate(rate)) for name, rate in profile.first_check.items()),
        ("disk", profile.disk),
        ("disk, four experts at a time", _by_size(profile.disk_read)),
        ("disk, one expert at a time", _by_size(profile.disk_read_alone)),
        *(
            (f"experts, {name}", f"{_by_number(rates, 'tokens')}, {profile.kernel_flops[name] / 1e9:.3g} GFLOP/s")
            for name, rates in profile.kernel_read.items()
        ),
        ("dense", f"{_rate(profile.dense_read)}, {profile.dense_flops / 1e9:.3g} GFLOP/s"),
        *(
            (f"a layer, {mode}", f"{profile.layer_s[mode] * 1e6:.3g} us, a step {profile.step_s[mode] * 1e6:.3g} us")
            for mode in profile.step_s
        ),
        ("an expert that is missed", f"{profile.layer_s['missing'] * 1e6:.3g} us beside its reading"),
        *((f"to the GPU, {name}", _rate(rate)) for name, rate in profile.copy.items()),
        ("a process without weights", format_bytes(profile.process_bytes)),
    ]
    if profile.others_load > _BUSY:
        taken = format_percent(profile.others_load)
        rows.append(("not to be trusted", f"other programs took {taken} of the processors: measure again"))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in rows)


def _summary(broken: int, harmful: int) -> str:
    if not broken and not harmful:
        return "Everything works."
    parts = [f"{broken} {'thing does' if broken == 1 else 'things do'} not work"] if broken else []
    parts += [f"{harmful} could be better"] if harmful else []
    return ", ".join(parts) + "."


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _by_number(rates: dict[int, float], unit: str) -> str:
    return ", ".join(f"{_rate(rate)} ({number} {unit[:-1] if number == 1 else unit})" for number, rate in rates.items())


def _by_size(rates: dict[int, float]) -> str:
    return ", ".join(f"{_rate(rate)} ({format_bytes(size)})" for size, rate in rates.items())
