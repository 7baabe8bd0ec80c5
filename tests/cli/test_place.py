"""`moeflow place` as a user types it: what is written, what is told, and what stays unwritten when it goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest

from helpers.export_readers import read_eplb, read_ranks, read_sglang
from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.files.plan import read_plan, read_plan_facts
from moeflow.placement.files.topology import read_topology
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import SOLVERS
from moeflow.placement.topology import preset
from moeflow.trace.format import TraceFormat
from moeflow.trace.workloads import read_workload, split_workload
from moeflow.trace.writer import TraceWriter

QUICK = ("--time-limit", "1")


def write_counts(path, seed=0, *, layers=3, experts=8, dense=0):
    load = np.random.default_rng(seed).integers(1, 100, (layers, experts))
    path.write_text(json.dumps({"logical_count": [[0] * experts] * dense + load.tolist()}))
    return str(path)


def write_trace(path, *, layers=3, experts=8):
    """Tokens that like to stay near the expert they came from, in six sequences."""
    rng = np.random.default_rng(0)
    with TraceWriter(path, TraceFormat((experts,) * layers, 1, "model", has_weights=False)) as writer:
        for sequence in range(6):
            rows = writer.new_rows(200)
            rows["sequence"], rows["phase"] = sequence, 1
            rows["experts"][:, 0, 0] = rng.integers(0, experts, 200)
            for layer in range(1, layers):
                rows["experts"][:, layer, 0] = (
                    rows["experts"][:, layer - 1, 0] + 3 * rng.integers(0, 2, 200)
                ) % experts
            writer.write(rows)
    return str(path)


def place(*arguments):
    return main(["place", *map(str, arguments), *QUICK])


def told(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_auto_runs_every_solver_and_writes_the_plan_with_the_least_objective(tmp_path, capsys):
    counts = write_counts(tmp_path / "c.json")
    assert place(counts, "--gpus", 4, "-o", tmp_path / "p", "--json", "--seed", 3) == 0
    out = told(capsys)
    assert {row["solver"] for row in out["solvers"]} | set(out["failures"]) == set(SOLVERS)
    best = min(out["solvers"], key=lambda row: row["objective_s"])
    facts = read_plan_facts(tmp_path / "p")
    assert (out["solver"], facts["solver"], facts["seed"]) == (best["solver"], best["solver"], 3)
    assert out["objective_s"] == facts["objective_s"] == best["objective_s"]
    topology = preset("nvlink", 4).without_memory_limits()
    problem = Problem((read_workload(counts),), topology, StepShape(communication="dispatch"))
    assert problem.objective(read_plan(tmp_path / "p")) == pytest.approx(best["objective_s"])
    assert out["communication"] == "dispatch"
    assert out["memory_checked"] is False


def test_one_bound_serves_every_gap_and_none_is_above_an_objective(tmp_path, capsys):
    assert place(write_counts(tmp_path / "c.json"), "--gpus", 2, "-o", tmp_path / "p", "--json") == 0
    rows = told(capsys)["solvers"]
    assert len({(row["bound_s"], row["bound_by"]) for row in rows}) == 1
    for row in rows:
        assert row["objective_s"] >= row["bound_s"] * (1 - 1e-9)
        assert row["gap"] == pytest.approx(row["objective_s"] / row["bound_s"] - 1, abs=1e-9)
        assert (row["status"] == "optimal") == (row["gap"] == 0)


def test_a_trace_is_placed_by_its_transitions_and_judged_on_what_was_held_out(tmp_path, capsys):
    trace = write_trace(tmp_path / "t")
    options = ("--gpus", 2, "--hold-out", 3, "--hidden-size", 2048, "--tokens", 1000, "--expert-mb", 10)
    options += ("--expert-bits", 4, "--communication", "path")
    assert place(trace, *options, "-o", tmp_path / "p", "--json") == 0
    out = told(capsys)
    assert (out["communication"], out["memory_checked"]) == ("path", True)
    seen, held_out = split_workload(trace, 3)
    step = StepShape(1000.0, 4096, 10**7, 4 * 10**7)
    for workload, key in ((seen, "in_sample"), (held_out, "out_of_sample")):
        cost = judge(read_plan(tmp_path / "p"), workload, preset("nvlink", 2), step)
        row = next(row for row in out["solvers"] if row["solver"] == out["solver"])
        assert row[key] == {workload.name: pytest.approx(cost.summary())}
    assert read_plan_facts(tmp_path / "p")["held_out_workloads"] == ["t, held out"]


def test_a_named_solver_is_run_beside_contiguous_alone(tmp_path, capsys):
    counts = write_counts(tmp_path / "c.json")
    assert place(counts, "--gpus", 4, "--solver", "greedy", "-o", tmp_path / "p", "--json") == 0
    assert [row["solver"] for row in told(capsys)["solvers"]] == ["contiguous", "greedy"]


def test_several_workloads_count_by_mean_or_by_the_worst_and_others_are_only_judged(tmp_path, capsys):
    files = [write_counts(tmp_path / f"{name}.json", seed) for seed, name in enumerate("abc")]
    options = ("--gpus", 4, "--solver", "greedy", "-o", tmp_path / "p", "--json")
    for worst, summary in (((), np.mean), (("--worst-case",), np.max)):
        assert place(*files[:2], *options, "--validate", files[2], *worst) == 0
        row = told(capsys)["solvers"][1]
        assert list(row["in_sample"]) == ["a", "b"]
        assert list(row["out_of_sample"]) == ["c"]
        steps = [cost["step_s"] for cost in row["in_sample"].values()]
        assert row["objective_s"] == pytest.approx(summary(steps))


def test_two_workloads_of_one_name_are_both_told(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    files = [write_counts(tmp_path / "a.json"), write_counts(tmp_path / "b" / "a.json", 1)]
    assert place(*files, "--gpus", 2, "--solver", "greedy", "-o", tmp_path / "p", "--json") == 0
    assert list(told(capsys)["solvers"][0]["in_sample"]) == ["a", "a (2)"]


def test_replicas_are_in_the_plan_and_exports_hold_the_same_placement(tmp_path, capsys):
    counts = write_counts(tmp_path / "c.json", dense=2)
    exports = [
        f"{kind}={tmp_path / name}" for kind, name in (("sglang", "s.json"), ("eplb", "e.npz"), ("npz", "r.npz"))
    ]
    options = [part for export in exports for part in ("--export", export)]
    assert (
        place(counts, "--gpus", 4, "--replicas", 4, "--solver", "eplb", *options, "-o", tmp_path / "p", "--json") == 0
    )
    out = told(capsys)
    plan = read_plan(tmp_path / "p")
    assert plan.num_replicas.sum(axis=1).max() == 12
    assert read_plan_facts(tmp_path / "p")["first_layer"] == 2
    assert read_sglang(tmp_path / "s.json", 4, 8, first_layer=2) == plan
    assert read_eplb(tmp_path / "e.npz", 4) == plan
    assert read_ranks(tmp_path / "r.npz") == plan
    assert [export["kind"] for export in out["exports"]] == ["sglang", "eplb", "npz"]
    assert out["exports"][0]["num_physical_experts"] == 12


@pytest.mark.slow
def test_pictures_go_to_one_file_or_to_a_folder(tmp_path, capsys):
    trace = write_trace(tmp_path / "t")
    for where, files in (("one.svg", ["one.svg"]), ("folder", ["folder/load.png", "folder/traffic.png"])):
        assert (
            place(trace, "--gpus", 2, "--solver", "greedy", "-o", tmp_path / "p", "--plot", tmp_path / where, "--json")
            == 0
        )
        assert told(capsys)["plots"] == [str(tmp_path / file) for file in files]
        assert all((tmp_path / file).stat().st_size for file in files)


def test_the_tables_show_every_solver_in_and_out_of_sample(tmp_path, capsys):
    files = [write_counts(tmp_path / f"{name}.json", seed) for seed, name in enumerate("ab")]
    assert place(files[0], "--gpus", 4, "--validate", files[1], "-o", tmp_path / "p") == 0
    out = capsys.readouterr().out
    assert "3 layers x 8 experts on 4 GPUs (nvlink), 0 replicas a layer" in out
    assert "memory not checked" in out
    assert "8 experts (assumed: --top-k)" in out
    assert "in sample: a" in out
    assert "out of sample: b" in out
    for solver in SOLVERS:
        assert out.count(f"  {solver} ") == 2 or f"{solver} found no plan" in out
    assert f"wrote {tmp_path / 'p'}: " in out.splitlines()[-1]


def test_a_topology_file_gives_the_number_of_gpus_and_their_memory(tmp_path, capsys):
    gpus = [
        {"count": 1, "memory": "1GB", "tflops": 100, "memory_gb_per_s": 900},
        {"count": 1, "memory": "150MB", "tflops": 20, "memory_gb_per_s": 300},
    ]
    (tmp_path / "t.json").write_text(json.dumps({"gpus": gpus, "links": {"within_node_gb_per_s": 10}}))
    counts = write_counts(tmp_path / "c.json")
    options = ("--topology", tmp_path / "t.json", "--solver", "greedy", "--expert-mb", 20, "-o", tmp_path / "p")
    assert place(counts, *options, "--json") == 0
    assert read_plan(tmp_path / "p").copies().tolist() == [[6, 2]] * 3
    capsys.readouterr()
    assert place(counts, *options, "--export", f"sglang={tmp_path / 's.json'}") == 1
    assert "GPU 1 has memory for 2. Export as npz" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--gpus", "0"], "0 GPUs were asked for"),
        ([], "say how many GPUs"),
        (["--gpus", "9"], "9 GPUs for 8 experts"),
        (["--gpus", "4", "--replicas", "-1"], "-1 replicas"),
        (["--gpus", "4", "--replicas", "25"], "every GPU holds every expert"),
        (["--gpus", "4", "--topology", "ring"], "Known: nvlink, pcie, two-nodes"),
        (["--gpus", "3", "--topology", "two-nodes"], "3 is odd"),
        (["--gpus", "4", "--solver", "magic"], "--solver magic is unknown. Allowed: auto, contiguous"),
        (["--gpus", "4", "--time-limit", "-1"], "--time-limit -1 is no time"),
        (["--gpus", "4", "--time-limit", "nan"], "--time-limit nan is no time"),
        (["--gpus", "4", "--tokens", "0"], "--tokens 0 is out of range"),
        (["--gpus", "4", "--hidden-size", "0"], "--hidden-size 0 is out of range"),
        (["--gpus", "4", "--top-k", "0"], "--top-k 0 is out of range"),
        (["--gpus", "4", "--top-k", "9"], "--top-k 9 is out of range: a layer has 8 experts"),
        (["--gpus", "4", "--seed", "-1"], "--seed -1 is out of range"),
        (["--gpus", "4", "--max-imbalance", "0.5"], "--max-imbalance 0.5 is out of range"),
        (["--gpus", "4", "--max-imbalance", "nan"], "--max-imbalance nan is out of range"),
        (["--gpus", "4", "--max-imbalance", "1.1"], "counts have none"),
        (["--gpus", "4", "--expert-mb", "0"], "--expert-mb 0 is no size"),
        (["--gpus", "4", "--expert-bits", "0"], "--expert-bits 0 is out of range"),
        (["--gpus", "4", "--expert-mb", "1e6"], "hold 0 experts of each layer"),
        (["--gpus", "4", "--communication", "path"], "counts no transitions"),
        (["--gpus", "4", "--hold-out", "5"], "counts, which cannot be split"),
        (["--gpus", "4", "--validate", "absent.json"], "absent.json cannot be read"),
        (["--gpus", "4", "--validate", "OTHER"], "Give counts of one model"),
        (["--gpus", "4", "--export", "vllm=x.json"], "Allowed: sglang, eplb, npz"),
        (["--gpus", "4", "--export", "sglang"], "--export sglang names no file"),
        (["--gpus", "4", "--export", "sglang=x.npz"], "must end in .json"),
        (["--gpus", "4", "--export", "eplb=/nowhere/x.npz"], "Make the folder"),
        (["--gpus", "4", "--plot", "a.pdf"], "ends in .png or .svg"),
        (["--gpus", "4", "--plot", "/nowhere/a.png"], "Make the folder"),
        (["--gpus", "4", "--plot", "/nowhere/plots"], "a folder that is there"),
        (["--gpus", "4", "--export", "sglang=a.json", "-o", "./a.json"], "a.json is named for two things"),
        (["--gpus", "4", "--validate", "OTHER", "-o", "OTHER"], "other.json is named for two things"),
        (["--gpus", "4", "-o", "/nowhere/p"], "Make the folder"),
    ],
)
def test_a_bad_option_is_told_in_one_line_and_nothing_is_written(tmp_path, capsys, options, what):
    counts = write_counts(tmp_path / "c.json")
    other = write_counts(tmp_path / "other.json", experts=6)
    options = [other if option == "OTHER" else option for option in options]
    assert main(["place", counts, "-o", str(tmp_path / "p"), *QUICK, *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moeflow: ")
    assert what in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.json", "other.json"]


def test_top_k_of_the_counts_is_not_contradicted(tmp_path, capsys):
    trace = write_trace(tmp_path / "t")
    assert place(trace, "--gpus", 2, "--top-k", 2, "-o", tmp_path / "p") == 1
    assert "--top-k 2 contradicts the counts, which say 1" in capsys.readouterr().err


def test_no_time_at_all_still_gives_the_best_plan_there_is(tmp_path, capsys):
    counts = write_counts(tmp_path / "c.json")
    assert main(["place", counts, "--gpus", "4", "--time-limit", "0", "-o", str(tmp_path / "p"), "--json"]) == 0
    assert read_plan(tmp_path / "p").num_gpus == 4


@pytest.mark.slow
def test_interrupted_it_exits_with_130_and_writes_nothing(tmp_path):
    """HiGHS is at work on the one layer's program when Ctrl-C comes."""
    np.savez(tmp_path / "c.npz", load=np.random.default_rng(0).random((1, 24)))
    command = [sys.executable, "-m", "moeflow", "place", str(tmp_path / "c.npz"), "--gpus", "6", "--time-limit", "600"]
    run = subprocess.Popen(
        [*command, "--solver", "moetuner", "-o", str(tmp_path / "p")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    process = psutil.Process(run.pid)
    while run.poll() is None and process.cpu_times().user < 2.5:
        with suppress(subprocess.TimeoutExpired):
            run.wait(0.05)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error.strip().splitlines()[-1]) == (130, "moeflow: interrupted")
    assert [file.name for file in tmp_path.iterdir()] == ["c.npz"]


def test_the_documentation_names_the_options_there_are_and_its_examples_hold(tmp_path, capsys):
    text = (ROOT / "docs" / "placement.md").read_text()
    options = {}
    for command in ("place", "tiers", "parallel"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options[command] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    known = options["place"] | options["tiers"] | options["parallel"]
    others = {"--init-expert-location", "--ep-num-redundant-experts", "--only"}  # of SGLang and the benchmark
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known | others
    assert options["place"] - {"--help", "--out", "--seed", "--json"} <= set(re.findall(r"--[a-z][a-z-]+", text))
    (tmp_path / "t.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert read_topology(tmp_path / "t.toml").num_gpus == 3
