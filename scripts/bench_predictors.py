"""How well and how fast the predictors predict, on the held-out fifth of a routing trace.

    python scripts/bench_predictors.py --trace ../shared/data/gpt_oss_20b [--sequence P] [--path P]

The trace is a file, or a folder of the gpt-oss-20b collection, which is converted first. Predictors whose files are
not given are trained here, on the other four fifths. Times are of one sequence at a time on one thread.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: live predictors run beside the model's own threads

import numpy as np
import torch

from moeflow.cli.progress import share_progress
from moeflow.predictors.ensemble import Ensemble
from moeflow.predictors.markov import Markov
from moeflow.predictors.path.net import PathNet, PathShape
from moeflow.predictors.path.predictor import PathPredictor
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.net import SequenceNet, SequenceShape
from moeflow.predictors.sequence.predictor import SequencePredictor
from moeflow.predictors.sequence.token_table import TokenTable
from moeflow.predictors.training import TrainingOptions
from moeflow.replay.predictor_quality import evaluate_predictor
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import open_predictor, split_sequences, train_predictor

NAMES = ("popularity", "markov", "path", "sequence", "ensemble")
KEYS = ("recall@4", "recall@6", "recall@8", "precision@4")
TARGETS = {  # of the sequence predictor on gpt-oss-20b
    "all_layers": {"recall@4": 0.68, "recall@6": 0.80, "recall@8": 0.87},
    "next_layer": {"recall@4": 0.74, "recall@6": 0.86},
}
SIZES = {"gpt-oss-20b": (24, 32, 4), "demo model": (30, 16, 2)}  # layers, experts, experts a token takes
_STEPS, _WARM_UP, _REPEATS = 40, 10, 5


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True, help="a trace, or the folder of the gpt-oss-20b collection")
    parser.add_argument("--sequence", metavar="P", help="a trained sequence predictor; without it one is trained")
    parser.add_argument("--path", metavar="P", help="a trained path predictor; without it one is trained")
    parser.add_argument("--epochs", type=int, default=8, help="of training, at most (8)")
    parser.add_argument("--threads", type=int, default=2, help="of training and evaluation (2)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        trace = open_source(Path(arguments.trace), Path(scratch))
        files = {"sequence": arguments.sequence, "path": arguments.path}
        trained_s = {}
        for kind in [kind for kind, file in files.items() if file is None]:
            begin, files[kind] = time.perf_counter(), Path(scratch) / kind
            with share_progress(f"training {kind}") as progress:
                options = TrainingOptions(epochs=arguments.epochs)
                train_predictor(trace, kind, files[kind], options=options, progress=progress)
            trained_s[kind] = time.perf_counter() - begin
        held_out = split_sequences(trace)[1]
        figures = {name: measure(name, files, trace, held_out) for name in NAMES}
        varied = [place for place in held_out if not repeats(trace, place)]
        if len(varied) < len(held_out):
            figures["varied"] = measure("sequence", files, trace, varied)
    times = {size: {name: step_times(build(name, *shape), *shape) for name in NAMES} for size, shape in SIZES.items()}
    print_tables(trace, figures, times, trained_s)
    print(
        json.dumps(
            {
                "trace": trace.fingerprint,
                "held_out_tokens": figures["sequence"]["tokens"],
                "chance": chance(trace),
                "targets": TARGETS,
                "figures": figures,
                "step_us": times,
                "training_s": trained_s,
            }
        )
    )


def open_source(source: Path, scratch: Path) -> RoutingTrace:
    """Open a trace, converting a folder first."""
    if source.is_dir():
        convert_trace(source, scratch / "trace")
        source = scratch / "trace"
    return RoutingTrace.open(source)


def repeats(trace: RoutingTrace, place: int) -> bool:
    """Whether a sequence is marked as repetitive."""
    number = int(trace.sequence_numbers[place])
    return number < len(trace.sequence_facts) and bool(trace.sequence_facts[number].get("repetition"))


def measure(name: str, files: dict, trace: RoutingTrace, places: list[int]) -> dict:
    """Evaluate one predictor on some held-out sequences."""
    if name == "ensemble":
        predictor = Ensemble([open_predictor(file, trace)[0] for file in (files["sequence"], "markov", "popularity")])
    else:
        predictor = open_predictor(files.get(name) or name, trace)[0]
    with share_progress(f"evaluating {name}") as progress:
        figures = evaluate_predictor(predictor, trace, places, progress=progress)
    assert all(0 <= figures[part][key] <= 1 for part in TARGETS for key in KEYS), f"{name}: not a share"
    return figures


def chance(trace: RoutingTrace) -> dict:
    """Return the recall of guessing."""
    return {f"recall@{k}": k / trace.num_experts for k in (4, 6, 8)} | {"precision@4": trace.top_k / trace.num_experts}


def build(name: str, num_layers: int, num_experts: int, top_k: int):
    """Return an untrained predictor of this size: as fast as a trained one."""
    if name == "path":
        return PathPredictor(PathNet(PathShape(num_layers, num_experts)))
    if name == "ensemble":
        members = [build(member, num_layers, num_experts, top_k) for member in ("sequence", "markov", "popularity")]
        return Ensemble(members)
    token_ids, experts = random_routes(num_layers, num_experts, top_k)
    routes = Routes([token_ids], [experts], None, num_experts)
    if name == "sequence":
        table = TokenTable.count(routes)
        shape = SequenceShape(num_layers, num_experts, len(table.known_ids)).within_limits()
        arrays = SequenceNet(shape, table.popularity).state_dict()
        return SequencePredictor(shape, table, {key: value.numpy() for key, value in arrays.items()})
    return {"popularity": Popularity, "markov": Markov}[name].train(routes)


def random_routes(num_layers: int, num_experts: int, top_k: int):
    """Return token ids [T] and experts [T, L, K] of a few thousand tokens."""
    rng = np.random.default_rng(0)
    experts = rng.random((2000, num_layers, num_experts)).argsort(-1)[:, :, :top_k]
    return rng.integers(0, 500, 2000).astype(np.int32), experts.astype(np.uint8)


def step_times(predictor, num_layers: int, num_experts: int, top_k: int) -> dict:
    """Return microseconds of one decode step: of `step`, `later`, one `observe`, and all together."""
    torch.set_num_threads(1)
    token_ids, experts = random_routes(num_layers, num_experts, top_k)
    weights = np.full((1, top_k), 1 / top_k, np.float32)
    rows = []
    for _ in range(_REPEATS):
        predictor.begin(1)
        spent = np.zeros(3)
        for t in range(_WARM_UP + _STEPS):
            begin = time.perf_counter()
            predictor.step(token_ids[t : t + 1])
            stepped = time.perf_counter()
            predictor.later()
            looked = time.perf_counter()
            for layer in range(num_layers):
                predictor.observe(layer, experts[t : t + 1, layer], weights)
            if t >= _WARM_UP:
                spent += stepped - begin, looked - stepped, time.perf_counter() - looked
        rows.append(1e6 * spent / _STEPS)
    step, later, observe = (statistics.median(column) for column in zip(*rows, strict=True))
    totals = [float(row.sum()) for row in rows]
    return {
        "step": step,
        "later": later,
        "observe": observe / num_layers,
        "total": statistics.median(totals),
        "total_range": [min(totals), max(totals)],
    }


def print_tables(trace: RoutingTrace, figures: dict, times: dict, trained_s: dict) -> None:
    """Print a card, then recall, then times."""
    some = figures["sequence"]
    print(
        f"{trace.fingerprint}: {trace.num_layers} layers of {trace.num_experts} experts, {trace.top_k} a token; "
        f"{some['tokens']:,} decode steps of {some['sequences']} held-out sequences"
    )
    if "varied" in figures:
        print(f"varied: the sequence predictor on the {figures['varied']['sequences']} that are not marked repetitive")
    for kind, seconds in trained_s.items():
        print(f"{kind} was trained here in {seconds:.0f} s")
    print(f"\n{'':<12}{'all layers, before the step':^48}{'next layer, within the step':^48}")
    print(f"{'':<12}" + "".join(f"{key:>12}" for key in KEYS) * 2)
    rows = {"chance": {part: chance(trace) for part in TARGETS}, **figures, "target": TARGETS}
    for name, row in rows.items():
        cells = (f"{row[part][key]:>12.3f}" if key in row[part] else f"{'':>12}" for part in TARGETS for key in KEYS)
        print(f"{name:<12}" + "".join(cells))
    for size, (num_layers, num_experts, _) in SIZES.items():
        print(f"\nus, {size}: {num_layers} layers of {num_experts} experts, one sequence, one thread")
        print(f"{'':<12}{'step':>10}{'later':>10}{'observe':>10}{'in all':>10}   range")
        for name, row in times[size].items():
            cells = "".join(f"{row[key]:>10.0f}" for key in ("step", "later", "observe", "total"))
            print(f"{name:<12}{cells}   {row['total_range'][0]:.0f} to {row['total_range'][1]:.0f}")


if __name__ == "__main__":
    main()
