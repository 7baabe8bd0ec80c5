"""Rows and tables of `moeflow place`: every solver's plan, in sample and out of sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeflow.formatting import MISSING, format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from rich.table import Table

    from moeflow.placement.cost import PlacementCost
    from moeflow.placement.problem import Problem, Solution
    from moeflow.placement.solve import Attempts
    from moeflow.placement.workload import Workload

_MIN_CONSOLE_WIDTH = 100  # of the widest table, with a little spare


def solver_rows(problem: Problem, attempts: Attempts, held_out: Sequence[Workload]) -> list[dict]:
    """Return the cost and the proven gap of each solver's plan.

    Returns:
        Rows of solver, objective_s, bound_s, bound_by, gap (None where infinite), status, time_s, in_sample and
        out_of_sample; the last two are workload name -> `PlacementCost.summary`.
    """
    from moeflow.placement.cost import judge

    def costs(solution: Solution, workloads: Sequence[Workload]) -> dict[str, dict]:
        judged = [judge(solution.plan, workload, problem.topology, problem.step) for workload in workloads]
        return {name: cost.summary() for name, cost in zip(names_of(workloads), judged, strict=True)}

    return [
        {
            "solver": solution.solver,
            "objective_s": solution.objective,
            "bound_s": solution.bound,
            "bound_by": solution.bound_by,
            "gap": None if solution.gap == float("inf") else solution.gap,
            "status": solution.status,
            "time_s": solution.seconds,
            "in_sample": costs(solution, problem.workloads),
            "out_of_sample": costs(solution, held_out),
        }
        for solution in attempts.solutions
    ]


def names_of(workloads: Sequence[Workload]) -> list[str]:
    """Return the workloads' names, numbered where two are the same."""
    names: list[str] = []
    for workload in workloads:
        name, number = workload.name, 2
        while name in names:
            name, number = f"{workload.name} ({number})", number + 1
        names.append(name)
    return names


def traffic(cost: PlacementCost, communication: str) -> np.ndarray:
    """Return [G, G], bytes that go from GPU to GPU in a step, both ways of a dispatch included."""
    if communication == "path":
        return cost.known_path_bytes().sum(axis=0)
    return cost.dispatch_bytes.sum(axis=0) + cost.dispatch_bytes.sum(axis=0).T


def print_tables(rows: list[dict], attempts: Attempts, best: Solution, problem: Problem) -> None:
    """Print a table in sample, one for each workload out of sample, and why solvers failed."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _MIN_CONSOLE_WIDTH
    chosen, communication = best.solver, problem.step.communication
    several = len(problem.workloads) > 1
    name = "the worst of all workloads" if problem.worst_case else "the mean of all workloads"
    title = name if several else next(iter(rows[0]["in_sample"]))
    lines = [(row, _mean(row["in_sample"].values()) | {"step_s": row["objective_s"]}) for row in rows]
    narrow = console.width < _MIN_CONSOLE_WIDTH
    console.print(_table(f"in sample: {title}", lines, chosen, communication, proven=True, narrow=narrow))
    for name in rows[0]["out_of_sample"]:
        lines = [(row, row["out_of_sample"][name]) for row in rows]
        console.print(_table(f"out of sample: {name}", lines, chosen, communication, proven=False, narrow=narrow))
    for solver, why in attempts.failures.items():
        console.print(f"{solver} found no plan: {why}", markup=False, soft_wrap=True)


def _table(
    title: str, lines: list[tuple[dict, dict]], chosen: str, communication: str, *, proven: bool, narrow: bool
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sent = "path_bytes" if communication == "path" else "dispatch_bytes"
    crossing = "dispatch_crossing" if any(cost["crossing"] is None for _, cost in lines) else "crossing"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 0 if narrow else 1)
    table.add_column("solver", no_wrap=True)
    for name in (
        "imbalance",
        "active",
        "crossing",
        "bytes",
        "step ms",
        *(("gap", "status", "took") if proven else ()),
    ):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for row, cost in lines:
        cells = [
            row["solver"],
            f"{cost['imbalance']:.3f}",
            f"{cost['activated_imbalance']:.3f}",
            MISSING if cost[crossing] is None else f"{cost[crossing]:.3f}",
            format_bytes(None if cost[sent] is None else round(cost[sent])),
            f"{cost['step_s'] * 1000:.3f}",
        ]
        if proven:
            gap = (
                MISSING
                if row["gap"] is None
                else f"{row['gap']:.1%}"
                if row["gap"] < 10
                else format_percent(row["gap"])
            )
            cells += [gap, row["status"], format_seconds(row["time_s"])]
        table.add_row(*cells, style="bold" if row["solver"] == chosen else None)
    return table


def _mean(summaries: Iterable[dict]) -> dict:
    """Each figure's mean over the workloads; None where one does not know it."""
    summaries = list(summaries)
    return {
        name: None if any(s[name] is None for s in summaries) else sum(s[name] for s in summaries) / len(summaries)
        for name in summaries[0]
    }
