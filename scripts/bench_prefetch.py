"""What prediction and prefetch would buy on a machine: the held-out sequences of a trace, replayed with a link.

    python scripts/bench_prefetch.py --trace T --predictor P [--limit 3] [--jobs 2] [--realised-out FILE]

The machine is one that runs gpt-oss-20b: 25 GB/s, 13.2 MB an expert, 0.35 ms of compute a layer; one FIFO, demand
ahead of prefetch; a step waits for missing experts; each sequence starts cold. Demand-only policies, the predictor
(forecast), the same prefetcher with perfect routes (clairvoyant), and the best order of copies known (best-order).
"""

import argparse
import json
import multiprocessing
import os
import time
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: one process a core, not one thread each of many
os.environ.setdefault("OMP_NUM_THREADS", "1")


from bench.machine import print_card
from moeflow.atomic_file import write_atomically
from moeflow.cli.progress import count_progress
from moeflow.replay.link import LinkModel
from moeflow.replay.machine import FORECAST, replay_machine, replayed_places
from moeflow.replay.predictor_quality import evaluate_predictor
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import open_predictor

DEMAND = ("lru", "lfu", "lfru", "belady")
CLAIRVOYANT = "clairvoyant"
POLICIES = (*DEMAND, FORECAST, CLAIRVOYANT, "best-order")
TARGETS = {"45": 0.80, "25": 0.55}  # share of the all-resident speed, on gpt-oss-20b


class Task(NamedTuple):
    """One row to find; crosses process borders."""

    trace: str
    policy: str
    predictor: str
    residency: float
    link: LinkModel
    places: list[int]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--trace", required=True, help="a trace file")
    parser.add_argument("--predictor", required=True, help="a trained predictor's file, or popularity, markov")
    parser.add_argument("--residency", default="15,25,35,45", help="percent of all experts")
    parser.add_argument("--limit", type=int, help="replay only the first N held-out sequences")
    parser.add_argument("--link-gb-s", type=float, default=25, help="gigabytes a second")
    parser.add_argument("--expert-mb", type=float, default=13.2, help="megabytes of one expert")
    parser.add_argument("--layer-ms", type=float, default=0.35, help="milliseconds of compute a layer")
    parser.add_argument("--in-flight", type=int, default=4, help="prefetches under way at once")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--realised-out", metavar="FILE", help="write the file of moeflow trace report --realised")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    arguments = parser.parse_args(argv)
    trace = RoutingTrace.open(arguments.trace)
    places = replayed_places(trace, arguments.predictor, None, arguments.limit)
    link = LinkModel(
        round(arguments.expert_mb * 1e6), arguments.link_gb_s * 1e9, arguments.layer_ms / 1e3, arguments.in_flight
    )
    begin = time.perf_counter()
    rows = find_rows(arguments, [float(text) for text in arguments.residency.split(",")], link, places)
    result = {
        "trace": trace.fingerprint,
        "predictor": open_predictor(arguments.predictor, trace)[0].name,
        "sequences": len(places),
        "tokens": rows[0]["tokens"],
        "top_k": trace.top_k,
        "link": {**link._asdict(), "copy_s": link.copy_s},
        "rows": rows,
        "targets": TARGETS,
        "seconds": time.perf_counter() - begin,
    }
    if arguments.realised_out:
        figures = evaluate_predictor(open_predictor(arguments.predictor, trace)[0], trace, places)
        write_realised(arguments.realised_out, result, figures)
    if not arguments.json:
        print_card(card_lines(trace, result, arguments))
        print_rows(rows)
    print(json.dumps(result))


def find_rows(arguments, residencies: list[float], link: LinkModel, places: list[int]) -> list[dict]:
    """Replay every policy at every residency, in as many processes as were asked for."""
    tasks = [
        Task(arguments.trace, policy, arguments.predictor, residency, link, places)
        for policy in POLICIES
        for residency in residencies
    ]
    order = sorted(range(len(tasks)), key=lambda place: tasks[place].policy not in (FORECAST, CLAIRVOYANT))  # slow ones
    rows: list = [None] * len(tasks)
    with count_progress("replaying") as progress:
        if arguments.jobs > 1:
            with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(tasks))) as pool:
                found = pool.imap(find_row, [tasks[place] for place in order], chunksize=1)
                for done, place in enumerate(order, 1):
                    rows[place] = next(found)
                    progress(done, len(tasks))
        else:
            for done, place in enumerate(order, 1):
                rows[place] = find_row(tasks[place])
                progress(done, len(tasks))
    return rows


def find_row(task: Task) -> dict:
    """Replay one policy at one residency."""
    trace = RoutingTrace.open(task.trace)
    policy, predictor = task.policy, task.predictor if task.policy == FORECAST else None
    if policy == CLAIRVOYANT:
        policy, predictor = FORECAST, CLAIRVOYANT
    row = replay_machine(trace, task.residency, policy, task.link, predictor=predictor, places=task.places)
    assert row["hits"] + row["late"] + row["misses"] == row["accesses"], "a demand was lost"
    return row | {"policy": task.policy}


def write_realised(path: str, result: dict, figures: dict) -> None:
    """Write the rows with prediction and the bytes it wasted, at the residency nearest 25 %, for a trace's report."""
    predicted = [row for row in result["rows"] if "prefetch" in row]
    shown = min({row["residency"] for row in predicted}, key=lambda residency: abs(residency - 25))
    at_shown = {row["policy"]: row["prefetch"] for row in predicted if row["residency"] == shown}
    recall = f"recall@{result['top_k']}"
    by_distance = {0: figures["all_layers"][recall]}
    by_distance |= {d: some[recall] for d, some in enumerate(figures["by_distance"], 1) if some[recall] is not None}
    content = {
        "rows": [{name: row[name] for name in ("policy", "residency", "hit_rate")} for row in predicted],
        "recall_by_distance": {result["predictor"]: by_distance},
        "wasted_bytes": {policy: account["wasted_bytes"] for policy, account in at_shown.items()},
        "timeliness": {
            policy: account["timeliness"]
            for policy, account in at_shown.items()
            if account["in_time"] + account["late"]
        },
    }
    write_atomically(path, json.dumps(content))


def card_lines(trace: RoutingTrace, result: dict, arguments) -> dict[str, str]:
    """Return the lines of the card, by name."""
    link = result["link"]
    return {
        "trace": f"{trace.fingerprint}: {trace.num_layers} layers of {trace.num_experts} experts, {trace.top_k} a "
        f"token; {result['tokens']:,} decode steps of {result['sequences']} held-out sequences",
        "machine": f"{link['bytes_per_s'] / 1e9:g} GB/s, {link['expert_bytes'] / 1e6:g} MB an expert "
        f"({1e3 * link['copy_s']:.3f} ms), {1e3 * link['layer_s']:g} ms a layer, {link['in_flight']} in flight",
        "predictor": f"{result['predictor']} ({arguments.predictor}); replayed in {result['seconds']:.0f} s",
        "resident": f"{1 / (trace.num_layers * link['layer_s']):.1f} tok/s",
    }


def print_rows(rows: list[dict]) -> None:
    """Print a table: shares beside the targets, and where copies went, a token."""
    header = f"{'residency':>9}  {'policy':<12}{'share':>7}{'target':>8}{'tok/s':>8}{'hit rate':>10}"
    print(header + f"{'issued':>9}{'in time':>9}{'late':>9}{'wasted MB':>11}  (a token)")
    for row in sorted(rows, key=lambda row: row["residency"]):
        target = TARGETS.get(f"{row['residency']:g}") if row["policy"] == FORECAST else None
        line = f"{row['residency']:>8g}%  {row['policy']:<12}{row['share']:>7.3f}"
        line += f"{target:>8.2f}" if target else f"{'':>8}"
        line += f"{row['tokens_per_s']:>8.1f}{row['hit_rate']:>10.4f}"
        if "prefetch" in row:
            account = row["prefetch"]
            line += "".join(f"{account[name] / row['tokens']:>9.2f}" for name in ("issued", "in_time", "late"))
            line += f"{account['wasted_bytes'] / 1e6 / row['tokens']:>11.2f}"
        elif "share_at_most" in row:
            line += f"  no order passes {row['share_at_most']:.3f}"
        print(line)


if __name__ == "__main__":
    main()
