"""`moeflow place`: plans the GPU of each expert, tells how good the plan is, and writes it for engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.atomic_file import check_target
from moeflow.cli.place_problem import add_step_options, read_problem
from moeflow.errors import ConfigError, MoeflowError

if TYPE_CHECKING:
    from moeflow.placement.plan import Plan
    from moeflow.placement.problem import Problem, Solution
    from moeflow.placement.solve import Attempts

    Solvers = dict[str, Callable[..., Solution]]


def add_place_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's commands."""
    place = commands.add_parser("place", help="plan which GPU holds which expert, with a proven gap")
    place.add_argument(
        "workloads",
        nargs="+",
        metavar="TRACE_OR_COUNTS",
        help="trace, gpt-oss folder or count file; of several, the mean step time counts",
    )
    place.add_argument("-o", "--out", required=True, metavar="PLAN", help="plan to write, JSON")
    place.add_argument("--gpus", type=int, metavar="N", help="how many; a topology file says it too")
    place.add_argument("--replicas", type=int, default=0, metavar="R", help="slots a layer beyond one an expert (0)")
    place.add_argument(
        "--topology", default="nvlink", metavar="T", help="nvlink, pcie, two-nodes, or a .json or .toml file (nvlink)"
    )
    place.add_argument("--solver", default="auto", metavar="NAME", help="auto runs all and takes the best (auto)")
    place.add_argument(
        "--max-imbalance",
        type=float,
        metavar="X",
        help="take the plan with the least crossing among those whose busiest GPU has at most X times the mean tokens",
    )
    place.add_argument("--time-limit", type=float, default=60, metavar="S", help="seconds for all solvers (60)")
    place.add_argument("--seed", type=int, default=0, metavar="I", help="seed of the solvers (0)")
    place.add_argument("--worst-case", action="store_true", help="of several workloads, the slowest counts")
    place.add_argument(
        "--validate", nargs="+", action="extend", default=[], metavar="OTHER", help="judge the plan on these too"
    )
    place.add_argument("--hold-out", type=int, metavar="N", help="judge on every Nth sequence, plan on the others")
    add_step_options(place)
    place.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="sglang=F.json, eplb=F.json or .npz, npz=F.npz",
    )
    place.add_argument("--plot", metavar="WHERE", help="a .png or .svg, or a folder for load.png and traffic.png")
    place.add_argument("--json", action="store_true", help="print one JSON object")
    place.set_defaults(run=_place)


def _place(arguments: argparse.Namespace) -> int:
    from moeflow.cli.place_tables import names_of, print_tables, solver_rows
    from moeflow.placement.files.plan import solution_facts, write_plan

    _check_numbers(arguments)
    exports = _checked_outputs(arguments)
    solvers = _solvers(arguments)
    problem, held_out = read_problem(arguments)
    attempts = _solve(problem, solvers, arguments)
    best = _chosen(arguments, attempts)
    rows = solver_rows(problem, attempts, held_out)
    facts = solution_facts(problem, best, seed=arguments.seed, held_out=held_out)
    facts |= {"workloads": names_of(problem.workloads), "held_out_workloads": names_of(held_out)}
    crossing: dict[str, float] = {}
    if arguments.max_imbalance is not None:
        names = ("max_imbalance", "crossing", "crossing_bound")
        crossing = {name: getattr(best, name) for name in names}
        facts |= crossing
    write_plan(arguments.out, best.plan, facts)
    exported = _export(exports, problem, best.plan)
    plots = _plot(arguments.plot, problem, attempts, best)
    if arguments.json:
        told = {"plan": arguments.out, "solver": best.solver, "status": best.status, "objective_s": best.objective}
        told |= {"bound_s": best.bound, "bound_by": best.bound_by, "gap": rows[attempts.solutions.index(best)]["gap"]}
        told |= {"communication": problem.step.communication, "memory_checked": arguments.expert_mb is not None}
        told |= crossing
        told |= {"exports": exported, "plots": plots, "failures": attempts.failures, "solvers": rows}
        print(json.dumps(told))
        return 0
    print(_headline(arguments, problem))
    print_tables(rows, attempts, best, problem)
    for export in exported:
        redundant = export.get("num_redundant_experts")
        slots = (
            "" if redundant is None else f": {export['num_physical_experts']} physical experts, {redundant} redundant"
        )
        filled = f", {export['num_filled']} free slots filled with second copies" if export["num_filled"] else ""
        print(f"wrote {export['file']}{slots}{filled}")
    for plot in plots:
        print(f"wrote {plot}")
    print(f"wrote {arguments.out}: {best.solver}, {_proven(best)}")
    if crossing:
        print(
            f"{crossing['crossing']:.3f} of all transitions change GPU; no plan within an imbalance of "
            f"{crossing['max_imbalance']:g} is below {crossing['crossing_bound']:.3f} (semidefinite relaxation)"
        )
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.time_limit < float("inf"):
        raise ConfigError(f"--time-limit {arguments.time_limit:g} is no time. Give seconds, 0 or more.")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed} is out of range. Give 0 or more.")
    if arguments.max_imbalance is not None and not 1 <= arguments.max_imbalance < float("inf"):
        raise ConfigError(
            f"--max-imbalance {arguments.max_imbalance:g} is out of range. Even load is 1: give 1 or more."
        )


def _checked_outputs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Refuse, before the work, what could not be written after it; return the exports as (kind, file)."""
    from moeflow.placement.files.exports import check_export

    exports = [(kind, file) for kind, _, file in (text.partition("=") for text in arguments.export)]
    for kind, file in exports:
        if not file:
            raise ConfigError(f"--export {kind} names no file. Give KIND=FILE, such as sglang=location.json.")
        check_export(kind, file)
    files = [arguments.out, *(file for _, file in exports)]
    for file in files:
        check_target(file, ConfigError)
    if arguments.plot:
        files += _plot_files(arguments.plot)
        if not Path(arguments.plot).absolute().parent.is_dir():
            raise ConfigError(f"{arguments.plot} cannot be written: give a name in a folder that is there.")
    taken = {Path(file).resolve() for file in (*arguments.workloads, *arguments.validate, arguments.topology)}
    for file in files:
        if Path(file).resolve() in taken:
            raise ConfigError(f"{file} is named for two things. Give each file that is written a name of its own.")
        taken.add(Path(file).resolve())
    return exports


def _solvers(arguments: argparse.Namespace) -> Solvers:
    """Return the solvers to run by name: contiguous always, joint last, since it makes most of the time."""
    from moeflow.placement.solvers import SOLVERS

    name = arguments.solver
    if name != "auto" and name not in SOLVERS:
        raise ConfigError(f"--solver {name} is unknown. Allowed: auto, {', '.join(SOLVERS)}.")
    names = SOLVERS if name == "auto" else dict.fromkeys(("contiguous", name))
    solvers = {name: SOLVERS[name] for name in sorted(names, key=lambda name: name == "joint")}
    if arguments.max_imbalance is None:
        return solvers
    from moeflow.placement.solvers.least_crossing import crossing_solver

    return solvers | {"crossing": crossing_solver(arguments.max_imbalance)}


def _chosen(arguments: argparse.Namespace, attempts: Attempts) -> Solution:
    """The solution to write: the fastest, or the one with the least crossing where a limit was given."""
    if arguments.max_imbalance is None:
        return attempts.best
    return next(solution for solution in attempts.solutions if solution.solver == "crossing")


def _solve(problem: Problem, solvers: Solvers, arguments: argparse.Namespace) -> Attempts:
    from moeflow.cli.progress import share_progress
    from moeflow.placement.solve import solve_all

    with share_progress("placing experts") as progress:
        attempts = solve_all(
            problem, solvers, seed=arguments.seed, time_limit_s=arguments.time_limit, progress=progress
        )
    for name in (arguments.solver, "crossing"):
        if name in attempts.failures:
            raise MoeflowError(f"{name} found no plan: {attempts.failures[name]}")
    return attempts


def _export(exports: list[tuple[str, str]], problem: Problem, plan: Plan) -> list[dict]:
    import numpy as np

    from moeflow.placement.files.exports import export_plan

    load = np.mean([workload.shares() for workload in problem.workloads], axis=0)
    first_layer = problem.workloads[0].first_layer
    return [
        {"kind": kind, "file": file}
        | export_plan(kind, file, plan, load=load, first_layer=first_layer, most=problem.limits)
        for kind, file in exports
    ]


def _plot_files(where: str) -> tuple[Path, ...]:
    """Return the file of one figure, or of two in a folder."""
    from moeflow.replay.plots import check_plot_path, require_matplotlib

    path = Path(where)
    if path.is_dir() or not path.suffix:
        require_matplotlib()
        return path / "load.png", path / "traffic.png"
    check_plot_path(path)
    return (path,)


def _plot(where: str | None, problem: Problem, attempts: Attempts, best: Solution) -> list[str]:
    """Draw load and traffic before, which is contiguous, and after."""
    from moeflow.cli.place_tables import traffic

    if not where:
        return []
    from moeflow.cli.place_plots import load_figure, placement_figure, traffic_figure
    from moeflow.replay.plots import save_figure

    before = next((s for s in attempts.solutions if s.solver == "contiguous"), attempts.solutions[0])
    old, new = (problem.costs(solution.plan)[0] for solution in (before, best))
    names = before.solver, best.solver
    loads = old.tokens, new.tokens
    sent = traffic(old, problem.step.communication), traffic(new, problem.step.communication)
    files = _plot_files(where)
    try:
        files[0].parent.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{where} cannot be made: {error.strerror}. Give a folder of yours.") from error
    if len(files) == 1:
        save_figure(placement_figure(loads, sent, names), files[0])
    else:
        save_figure(load_figure(loads[0], loads[1], names), files[0])
        save_figure(traffic_figure(sent[0], sent[1], names), files[1])
    return [str(file) for file in files]


def _headline(arguments: argparse.Namespace, problem: Problem) -> str:
    from moeflow.formatting import format_bytes

    step = problem.step
    top_k = round(step.assignments / arguments.tokens)
    known = any(workload.top_k for workload in problem.workloads) or arguments.top_k
    gpus = f"{problem.num_gpus} GPU{'s' if problem.num_gpus > 1 else ''}"
    size = format_bytes(step.expert_bytes)
    memory = f"experts of {size}" if arguments.expert_mb else f"memory not checked (--expert-mb; {size} assumed)"
    return (
        f"{problem.num_layers} layers x {problem.num_experts} experts on {gpus} "
        f"({problem.topology.name}), {problem.num_replicas} replicas a layer. A step: {arguments.tokens:,} tokens x "
        f"{top_k} experts{'' if known else ' (assumed: --top-k)'}, hidden size {arguments.hidden_size:,}, "
        f"{step.communication}; {memory}."
    )


def _proven(solution: Solution) -> str:
    step = f"a step in {solution.objective * 1000:.4g} ms"
    if solution.status == "optimal":
        return f"{step}, proven optimal ({solution.bound_by})"
    if solution.gap == float("inf"):
        return f"{step}, nothing proven ({solution.status})"
    return f"{step}; no plan within these slots is faster than {solution.bound * 1000:.4g} ms ({solution.bound_by})"
