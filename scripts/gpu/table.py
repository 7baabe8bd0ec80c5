"""The report as text: one line a run of a step, a table of its rows, and how the speeds compare with full residency."""

from typing import Any

from gpu.report_file import SKIPPED

TARGETS = {"45%": 0.90, "25%": 0.75}  # share of the all-resident speed, bfloat16, real routes
_WIDEST = 60  # characters of a cell


def markdown(content: dict[str, Any]) -> str:
    """Return the report of a run as markdown."""
    steps = content["steps"]
    lines = [f"# Report on a card, {content['started']}", ""]
    short = sum(one["status"] == SKIPPED for one in steps)
    state = f"{short} runs skipped for want of time" if short else "complete"
    lines += [f"{content['seconds']:.0f} s; {state if content['finished'] else 'CUT SHORT'}.", ""]
    overview = [
        {
            "step": _title(one),
            "status": one["status"],
            "s": one["seconds"],
            "error": _last_line(one["error"]),
        }
        for one in steps
    ]
    lines += [*table(overview), ""]
    if shares := resident_shares(steps):
        lines += ["## Speed against full residency", "", *table(shares), ""]
    for name in dict.fromkeys(one["step"] for one in steps):
        mine = [one for one in steps if one["step"] == name and (one["rows"] or one["facts"])]
        if not mine:
            continue
        lines += [f"## {name}", ""]
        rows = [{**_flat(one["case"]), **_flat(row)} for one in mine for row in one["rows"]]
        lines += [*table(rows), ""] if rows else []
        facts = [f"- {_title(one)}: {key} {_cell(value)}" for one in mine for key, value in _flat(one["facts"]).items()]
        lines += [*facts, ""] if facts else []
    return "\n".join(lines)


def resident_shares(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed of each row of end_to_end over that of full residency in the same format."""
    found = [(one["case"], row) for one in steps if one["step"] == "end_to_end" for row in one["rows"]]
    resident = [(case, row) for case, row in found if case["share"] == "100%" and not case.get("cuda_graphs")]
    whole = {case["format"]: row["tok_per_s"] for case, row in resident}
    return [
        {
            **{key: case[key] for key in ("format", "share", "miss")},
            "predictor": row["predictor"],
            "cuda_graphs": case.get("cuda_graphs", False),
            "tok_per_s": row["tok_per_s"],
            "of_resident": row["tok_per_s"] / whole[case["format"]],
            "wanted": TARGETS.get(case["share"]) if case["format"] == "bfloat16" else None,
        }
        for case, row in found
        if case["format"] in whole
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a markdown table with a column for each key, in the order in which they come."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return []
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    return lines + [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows]


def _title(entry: dict[str, Any]) -> str:
    shown = [_cell(value) for key, value in entry["case"].items() if key not in ("predictors", "shares", "tests")]
    return f"{entry['step']} {' '.join(shown)}".strip()


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return values without lists of names, inner dicts spread under dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": one for inner, one in _flat(value).items()}
        elif key not in ("predictors", "shares", "tests"):
            found[key] = value
    return found


def _last_line(error: str | None) -> str:
    return (error or "-").splitlines()[-1]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
