"""Measure placement on real routing: its gain, its gap to the optimum, its time and memory.

    python scripts/bench_placement.py [--data ../shared/data] [--only gpt-oss deepseek small gap scale] [--plot FOLDER]

gpt-oss    crossing (share of layer-to-layer transitions that change GPU) against imbalance (mean over layers of the
           busiest GPU's tokens over the mean) on gpt-oss-20b, of whose sequences without `duplicate` every fifth is
           held out: baselines, the least crossing within a limit of imbalance with its bound, the whole Pareto curve.
deepseek   imbalance of 58 x 256 experts with 32 replicas a layer, planned on each of the prefill workloads and judged
           on that one and on each of the others.
small      every solver's claim against brute force: instances small enough to try all plans.
gap        24 x 32 experts on 4 GPUs: step time, its bound and the gap, by topology.
scale      58 x 256 experts on 32 GPUs through `moeflow place`: seconds, peak memory, gap; counts alone, and counts with
           made-up transitions.

Baselines run in the same process on the same counts. The ceilings beside the figures are the proven bounds. The last
line is one JSON object.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bench.machine import describe
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.files.counts import read_counts
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import SOLVERS
from moeflow.placement.solvers.joint import joint
from moeflow.placement.solvers.least_crossing import crossing_bounds, least_crossing, pareto_curve
from moeflow.placement.solvers.search import cool
from moeflow.placement.tables import Tables
from moeflow.placement.topology import preset
from moeflow.placement.workload import Workload
from moeflow.trace.workloads import split_workload

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("gpt-oss", "deepseek", "small", "gap", "scale")
LIMITS = {4: (1.083, 1.12, 1.355), 8: (1.164, 1.18, 1.2, 1.405)}
WANTED = {4: (0.54, 1.12, 1.16), 8: (0.72, 1.20, 1.25)}  # crossing, imbalance in sample, imbalance held out
WEIGHTS = np.geomspace(0.05, 1.0, 20)  # of imbalance against crossing, for the curve
BOUND_WEIGHTS = (0.02, 0.06, 0.1, 0.14, 0.18, 0.25, 0.4, 0.8)
# gpt-oss-20b: hidden size 2880, three matrices of 2880 x 2880 in 4.25 bits; 8,192 tokens a step.
GPT_OSS_STEP = StepShape(4 * 8192, 2 * 2880, round(3 * 2880 * 2880 * 4.25 / 8), 6 * 2880 * 2880)
# Tokens alone: so many that reading weights never counts.
LOAD_STEP = StepShape(8 * 2**17, communication="dispatch")


def main(argv=None) -> None:
    """Print the sections and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT / "../shared/data")))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--plot", type=Path, help="folder for the Pareto curves")
    arguments = parser.parse_args(argv)
    found = describe("moeflow", "pulp", "highspy")
    print(f"{found['cpu']}, {found['cores']} cores")
    if {"gpt-oss", "gap"} & set(arguments.only):
        seen, held_out = split_workload(arguments.data / "gpt_oss_20b", 5)
    for section in arguments.only:
        begin = time.perf_counter()
        print(f"\n== {section}")
        if section == "gpt-oss":
            found[section] = bench_gpt_oss(seen, held_out, arguments.plot)
        elif section == "gap":
            found[section] = bench_gap(seen)
        elif section == "small":
            found[section] = bench_small()
        else:
            bench = {"deepseek": bench_deepseek, "scale": bench_scale}[section]
            found[section] = bench(arguments.data / "deepseek_v3_load")
        print(f"({time.perf_counter() - begin:.0f} s)")
    print(json.dumps(found))


def bench_gpt_oss(seen: Workload, held_out: Workload, plot: Path | None) -> dict:
    """Crossing against imbalance, in sample and held out."""
    out = {}
    for num_gpus, limits in LIMITS.items():
        problem = Problem((seen,), preset("nvlink", num_gpus).without_memory_limits(), GPT_OSS_STEP)
        print(f"\n{num_gpus} GPUs              crossing  imbalance | held out: crossing  imbalance | bound   gap     s")
        rows, points = [], []

        def show(name, plan, seconds, bound=None, rows=rows, problem=problem):
            costs = [judge(plan, workload, problem.topology, problem.step) for workload in (seen, held_out)]
            row = {"plan": name, "seconds": seconds, "bound": bound}
            for where, cost in zip(("in", "out"), costs, strict=True):
                row |= {f"crossing_{where}": cost.crossing, f"imbalance_{where}": cost.imbalance}
            rows.append(row)
            proven = "-              " if bound is None else f"{bound:.4f}  {row['crossing_in'] / bound - 1:6.1%}"
            print(
                f"{name:22s} {row['crossing_in']:.4f}    {row['imbalance_in']:.4f}   |           "
                f"{row['crossing_out']:.4f}     {row['imbalance_out']:.4f} | {proven} {seconds:5.1f}"
            )

        for name in ("contiguous", "random", "greedy", "eplb", "moetuner"):
            solution = SOLVERS[name](problem, time_limit_s=30)
            show(name, solution.plan, solution.seconds)
        for limit in limits:
            answer = least_crossing(problem, limit, time_limit_s=60)
            show(f"imbalance <= {limit}", answer.point.plan, answer.seconds, answer.bound)
            points += answer.curve
        crossing, inside, outside = WANTED[num_gpus]
        reached = [
            row["plan"]
            for row in rows
            if row["crossing_in"] <= crossing and row["imbalance_in"] <= inside and row["imbalance_out"] <= outside
        ]
        print(f"wanted: crossing <= {crossing} at imbalance <= {inside} and held out <= {outside}: {reached or 'no'}")
        curve = _front([*points, *pareto_curve(problem, WEIGHTS, time_limit_s=300)])
        grid = np.linspace(1, curve[-1].imbalance, 25).tolist()
        below = list(zip(grid, crossing_bounds(problem, BOUND_WEIGHTS, grid), strict=True))
        found = [(point.imbalance, point.crossing) for point in curve]
        print("Pareto curve: " + ", ".join(f"{crossing:.3f} at {imbalance:.3f}" for imbalance, crossing in found))
        print(
            "proven: "
            + ", ".join(f"none below {crossing:.3f} at {imbalance:.3f}" for imbalance, crossing in below[::4])
        )
        out[num_gpus] = {"rows": rows, "reached": reached, "curve": found, "bound": below}
        if plot is not None:
            _plot_curve(plot / f"placement_pareto_{num_gpus}.png", problem, curve, below, held_out, rows)
    return out


def _front(points):
    """The points that no other is better than in both, by rising imbalance."""
    best, out = float("inf"), []
    for point in sorted(points, key=lambda point: (point.imbalance, point.crossing)):
        if point.crossing < best:
            best = point.crossing
            out.append(point)
    return out


def _plot_curve(path, problem, curve, below, held_out, rows):
    from moeflow.cli.place_plots import pareto_figure
    from moeflow.replay.plots import save_figure

    outside = [judge(point.plan, held_out, problem.topology, problem.step) for point in curve]
    curves = {
        "least crossing": [(point.imbalance, point.crossing) for point in curve],
        "least crossing, held out": sorted((cost.imbalance, cost.crossing) for cost in outside),
        "no plan is below": below,
    }
    points = {row["plan"]: (row["imbalance_in"], row["crossing_in"]) for row in rows if row["bound"] is None}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(pareto_figure(curves, points, f"gpt-oss-20b on {problem.num_gpus} GPUs"), path)
    print(f"wrote {path}")


def bench_deepseek(folder: Path) -> dict:
    """Imbalance in sample and on other workloads, by solver and number of GPUs."""
    workloads = [read_counts(path) for path in sorted(folder.glob("*.json"))]
    others = ~np.eye(len(workloads), dtype=bool)
    out = {}
    print("imbalance planned on each of the workloads: in sample (mean, worst), on the others (mean, worst), and the")
    print("others' excess over 1 against EPLB's (mean of pairs)\n")
    for num_gpus in (8, 16, 32, 64):
        judged, seconds = {}, {}
        solvers = {name: SOLVERS[name] for name in ("contiguous", "greedy", "eplb", "moetuner", "joint")}
        for name, solver in (solvers | {"annealed": _annealed}).items():
            begin = time.perf_counter()
            table = np.array([_imbalances(solver, num_gpus, planned, workloads) for planned in workloads])
            judged[name], seconds[name] = table, (time.perf_counter() - begin) / len(workloads)
        out[num_gpus] = {}
        for name, table in judged.items():
            inside, outside = table.diagonal(), table[others]
            excess = float(((outside - 1) / (judged["eplb"][others] - 1)).mean())
            out[num_gpus][name] = {
                "in_mean": inside.mean(), "in_worst": inside.max(), "out_mean": outside.mean(),
                "out_worst": outside.max(), "excess": excess, "seconds": seconds[name],
                "pairs_no_worse_than_eplb": int((outside <= judged["eplb"][others] + 1e-12).sum()),
                "pairs": int(others.sum()),
            }  # fmt: skip
            row = out[num_gpus][name]
            print(
                f"{num_gpus:2d} GPUs {name:10s} in {row['in_mean']:.4f} {row['in_worst']:.4f}   others "
                f"{row['out_mean']:.4f} {row['out_worst']:.4f}   excess x {excess:.3f}   no worse than EPLB in "
                f"{row['pairs_no_worse_than_eplb']} of {row['pairs']} pairs   {seconds[name]:.1f} s"
            )
    return out


def _imbalances(solver, num_gpus, planned, workloads):
    problem = Problem((planned,), preset("nvlink", num_gpus).without_memory_limits(), LOAD_STEP, num_replicas=32)
    plan = solver(problem, time_limit_s=15).plan
    return [judge(plan, workload, problem.topology, problem.step).imbalance for workload in workloads]


def _annealed(problem, *, time_limit_s):
    """What `joint` leaves out for load alone: annealing with replicas free to go to other experts."""
    start = SOLVERS["random"](problem).plan
    copies = problem.num_layers * (problem.num_experts + problem.num_replicas)
    found = cool(Tables(problem), start, 500 * copies, deadline=time.monotonic() + time_limit_s)
    return SimpleNamespace(plan=found.plan)


def bench_small() -> dict:
    """`joint` against every possible plan."""
    cases = [  # layers, experts, GPUs, replicas, communication, topology
        (2, 8, 2, 0, "path", "nvlink"),
        (2, 8, 2, 0, "path", "pcie"),
        (2, 8, 2, 0, "dispatch", "pcie"),
        (2, 6, 3, 0, "path", "pcie"),
        (2, 4, 2, 1, "path", "pcie"),
        (3, 4, 2, 0, "path", "pcie"),
        (2, 4, 4, 0, "path", "two-nodes"),
    ]
    rng, rows = np.random.default_rng(0), []
    for layers, experts, gpus, replicas, communication, topology in cases:
        workload = Workload(
            "random", rng.gamma(1, size=(layers, experts)), rng.gamma(0.3, size=(layers - 1, experts, experts))
        )
        step = StepShape(communication=communication)
        problem = Problem((workload,), preset(topology, gpus).without_memory_limits(), step, replicas)
        best, tried = _brute_force(problem)
        solution = joint(problem)
        ratio = solution.objective / best
        rows.append({"case": cases[len(rows)], "ratio": ratio, "status": solution.status, "seconds": solution.seconds})
        print(
            f"{layers} x {experts} on {gpus} ({topology}, {communication}, {replicas} replicas): best of {tried:,} "
            f"plans {best * 1e3:.6f} ms, joint / best {ratio:.9f}, {solution.status} by {solution.bound_by}, "
            f"{solution.seconds:.2f} s"
        )
    return {"rows": rows, "all_equal": all(abs(row["ratio"] - 1) < 1e-6 for row in rows)}


def _brute_force(problem):
    """Return the least objective of all plans within the slots, and how many there are."""
    gpus = range(problem.num_gpus)
    sets = [s for size in range(1, problem.num_replicas + 2) for s in itertools.combinations(gpus, size)]
    most = problem.num_experts + problem.num_replicas
    layers = [
        layer
        for layer in itertools.product(sets, repeat=problem.num_experts)
        if sum(map(len, layer)) <= most
        and all(sum(gpu in held for held in layer) <= problem.slots[gpu] for gpu in gpus)
    ]
    plans = itertools.product(layers, repeat=problem.num_layers)
    return min(problem.objective(Plan(problem.num_gpus, plan)) for plan in plans), len(layers) ** problem.num_layers


def bench_gap(seen: Workload) -> dict:
    """The proven gap of the step time, and seconds, of 24 x 32 experts."""
    out = {}
    for num_gpus, topology in ((4, "nvlink"), (4, "pcie"), (8, "pcie"), (8, "two-nodes")):
        problem = Problem((seen,), preset(topology, num_gpus).without_memory_limits(), GPT_OSS_STEP)
        rows = {name: solve(problem, time_limit_s=60) for name, solve in SOLVERS.items()}
        bound = max(solution.bound for solution in rows.values())
        out[f"{num_gpus} {topology}"] = {
            name: {"step_s": s.objective, "gap": s.objective / bound - 1, "seconds": s.seconds, "status": s.status}
            for name, s in rows.items()
        }
        print(f"{num_gpus} GPUs, {topology}: no plan is below {bound * 1e3:.2f} ms ({rows['joint'].bound_by})")
        for name, s in rows.items():
            print(
                f"    {name:10s} {s.objective * 1e3:7.2f} ms   gap {s.objective / bound - 1:6.1%}   {s.seconds:5.1f} s"
            )
    return out


def bench_scale(folder: Path) -> dict:
    """The command as a user runs it, on the largest model: counts alone, then with transitions."""
    out = {}
    with tempfile.TemporaryDirectory() as scratch:
        counts = folder / "prefill_in1024.json"
        made_up = Path(scratch) / "transitions.npz"
        load = read_counts(counts).shares()
        links = np.random.default_rng(0).gamma(0.1, size=(len(load) - 1, 256, 256))
        np.savez(made_up, load=load, transitions=load[:-1, :, None] * links * load[1:, None, :], top_k=8)
        for name, path, way in (("counts", counts, "dispatch"), ("with transitions", made_up, "path")):
            command = [sys.executable, "-m", "moeflow", "place", str(path), "--gpus", "32", "--replicas", "32"]
            command += [
                "--communication",
                way,
                "--tokens",
                str(2**17),
                "--time-limit",
                "100",
                "--json",
                "-o",
                f"{scratch}/plan.json",
            ]
            begin = time.perf_counter()
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
            told, seconds = json.loads(run.stdout), time.perf_counter() - begin
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            out[name] = {"seconds": seconds, "peak_bytes": peak}
            print(f"{name}: {seconds:.0f} s in all, peak {peak / 1e9:.2f} GB, bound by {told['bound_by']}")
            for row in told["solvers"]:
                imbalance = next(iter(row["in_sample"].values()))["imbalance"]
                out[name][row["solver"]] = {"step_s": row["objective_s"], "gap": row["gap"], "imbalance": imbalance}
                print(
                    f"    {row['solver']:10s} {row['objective_s'] * 1e3:8.2f} ms   gap {row['gap']:7.2%}   imbalance "
                    f"{imbalance:.4f}   {row['status']}   {row['time_s']:.1f} s"
                )
    return out


if __name__ == "__main__":
    main()
