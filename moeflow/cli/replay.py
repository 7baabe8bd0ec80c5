"""`moeflow trace replay` and `moeflow trace report`: hits and costs of caches on a trace, as rows, plots and a page."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from moeflow.replay.link import LinkModel
    from moeflow.trace.trace import RoutingTrace


def add_replay_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `replay` and `report` to the commands of `moeflow trace`."""
    replay = commands.add_parser("replay", help="hit rates of eviction policies on a trace")
    replay.add_argument("trace", help="a trace file")
    replay.add_argument(
        "--residency", default="15,25,35,45", metavar="LIST", help="percent of all experts (15,25,35,45)"
    )
    replay.add_argument(
        "--policy",
        default="lru,lfu,lfru,belady",
        metavar="LIST",
        help="of lru, lfu, lfru, static, popularity, belady, random; on a machine also best-order, the bound "
        "(lru,lfu,lfru,belady)",
    )
    replay.add_argument("--warm", action="store_true", help="sequences start with what the one before left")
    replay.add_argument("--per-layer", action="store_true", help="each layer has slots of its own")
    _add_phase(replay)
    replay.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random policy (0)")
    _add_machine(replay)
    replay.add_argument("--plot", metavar="FILE", help="hit rate over residency, .png or .svg")
    replay.add_argument("--heat-map", metavar="FILE", help="demand by layer and expert, .png or .svg")
    replay.add_argument("--json", action="store_true", help="print a JSON list of rows")
    replay.set_defaults(run=_replay)

    report = commands.add_parser("report", help="one HTML file about a trace, with advice on the residency to buy")
    report.add_argument("trace", help="a trace file")
    report.add_argument("-o", "--out", required=True, metavar="FILE", help="HTML file to write")
    report.add_argument("--realised", metavar="FILE", help="JSON of measured hit rates to show beside the replays")
    report.add_argument("--expert-mb", type=float, metavar="MB", help="megabytes of one expert, for the advice")
    report.add_argument(
        "--max-tokens", type=int, default=20_000, metavar="N", help="replay about so many tokens of the trace (20000)"
    )
    _add_phase(report)
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.set_defaults(run=_report)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options of a machine, of a predictor on it, and of the sequences to replay."""
    machine = parser.add_argument_group("on a machine", "what decoding would cost; the first three go together")
    machine.add_argument("--link-gb-s", type=float, metavar="GB", help="gigabytes a second of the link")
    machine.add_argument("--expert-mb", type=float, metavar="MB", help="megabytes of one expert")
    machine.add_argument("--layer-ms", type=float, metavar="MS", help="milliseconds of one layer, all resident")
    machine.add_argument(
        "--predictor",
        metavar="P",
        help="prefetch and evict by popularity, markov, lookahead (where the trace holds it), clairvoyant, or a file",
    )
    machine.add_argument("--in-flight", type=int, metavar="N", help="prefetches under way at once (4)")
    parser.add_argument("--hold-out", type=int, metavar="N", help="only every Nth sequence, as training holds it out")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N sequences of those")


def _add_phase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--phase", default="decode", choices=("decode", "all"), help="all: prompts too, token by token (decode)"
    )


def _replay(arguments: argparse.Namespace) -> int:
    from moeflow.replay.demand import replay_trace, sequence_rows
    from moeflow.replay.machine import replayed_places
    from moeflow.replay.plots import check_plot_path, heat_map_figure, hit_rate_figure, save_figure
    from moeflow.trace.locality import demand_by_expert
    from moeflow.trace.trace import RoutingTrace

    for path in filter(None, (arguments.plot, arguments.heat_map)):
        check_plot_path(path)  # before the work, not after it
    residencies, policies = _percents(arguments.residency), _names(arguments.policy)
    link = _machine_of(arguments)
    trace = RoutingTrace.open(arguments.trace)
    places = replayed_places(trace, arguments.predictor, arguments.hold_out, arguments.limit)
    if link is not None:
        rows = _machine_rows(trace, residencies, policies, link, arguments.predictor, places)
    chosen = trace if len(places) == len(trace.sequences()) else trace.select(trace.sequence_numbers[places])
    if link is None:
        rows = replay_trace(
            chosen,
            residencies,
            policies,
            per_layer=arguments.per_layer,
            warm=arguments.warm,
            phase=arguments.phase,
            seed=arguments.seed,
        )
    if arguments.plot:
        save_figure(hit_rate_figure(rows), arguments.plot)
    if arguments.heat_map:
        experts, _ = sequence_rows(chosen, arguments.phase)
        save_figure(heat_map_figure(demand_by_expert(experts, trace.experts_per_layer)), arguments.heat_map)
    if arguments.json:
        print(json.dumps(rows))
    else:
        _print_rows(rows)
    return 0


def _machine_of(arguments: argparse.Namespace) -> "LinkModel | None":
    """Return the machine of the options, None without one.

    Raises:
        ConfigError: options that do not go together, or no sizes.
    """
    from moeflow.replay.link import LinkModel

    sizes = {"--link-gb-s": arguments.link_gb_s, "--expert-mb": arguments.expert_mb, "--layer-ms": arguments.layer_ms}
    given = [name for name, value in sizes.items() if value is not None]
    if not given:
        for name, value in (("--predictor", arguments.predictor), ("--in-flight", arguments.in_flight)):
            if value is not None:
                raise ConfigError(f"{name} works on a machine. Give it: {', '.join(sizes)}.")
        return None
    if len(given) < len(sizes):
        raise ConfigError(f"{', '.join(given)} alone is no machine. Give {', '.join(sizes)} together.")
    for name, value in sizes.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g} is out of range. Give a number above 0.")
    for name, value, usual in (
        ("--warm", arguments.warm, False),
        ("--per-layer", arguments.per_layer, False),
        ("--phase all", arguments.phase == "all", False),
        ("--seed", arguments.seed, 0),
    ):
        if value != usual:
            raise ConfigError(
                f"{name} does not go with {given[0]}: on a machine, decode steps are replayed from a cold cache of one "
                "pool. Leave one of the two out."
            )
    if arguments.in_flight is not None:
        if arguments.predictor is None:
            raise ConfigError("--in-flight limits prefetches, and without --predictor there are none.")
        if arguments.in_flight < 1:
            raise ConfigError(f"--in-flight {arguments.in_flight} prefetches nothing. Give at least 1.")
    return LinkModel(
        round(arguments.expert_mb * 1e6),
        arguments.link_gb_s * 1e9,
        arguments.layer_ms / 1e3,
        **({} if arguments.in_flight is None else {"in_flight": arguments.in_flight}),
    )


def _machine_rows(
    trace: "RoutingTrace",
    residencies: list[float],
    policies: list[str],
    link: "LinkModel",
    predictor: str | None,
    places: list[int],
) -> list[dict]:
    """Replay every policy at every residency on a machine, a predictor's last."""
    from moeflow.cli.progress import count_progress
    from moeflow.replay.demand import slots_of
    from moeflow.replay.machine import FORECAST, check_policy, replay_machine

    if predictor is not None and FORECAST not in policies:
        policies = [*policies, FORECAST]
    for residency in residencies:  # before the work, not in the middle of it
        slots_of(residency, trace.experts_per_layer, trace.top_k)
    for policy in policies:
        check_policy(policy, predictor)
    rows = []
    for policy in policies:
        for residency in residencies:
            with count_progress(f"{policy} at {residency:g} %") as progress:
                rows.append(
                    replay_machine(
                        trace,
                        residency,
                        policy,
                        link,
                        predictor=predictor if policy == FORECAST else None,
                        places=places,
                        progress=progress,
                    )
                )
    return rows


def _report(arguments: argparse.Namespace) -> int:
    from moeflow.replay.measured import read_realised
    from moeflow.replay.report import write_report
    from moeflow.trace.trace import RoutingTrace

    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens} replays nothing. Give at least 1.")
    if arguments.expert_mb is not None and not 0 < arguments.expert_mb < float("inf"):
        raise ConfigError(f"--expert-mb {arguments.expert_mb:g} is no size. Give megabytes above 0.")
    words = write_report(
        RoutingTrace.open(arguments.trace),
        arguments.out,
        realised=read_realised(arguments.realised) if arguments.realised else None,
        phase=arguments.phase,
        expert_bytes=round(arguments.expert_mb * 1e6) if arguments.expert_mb else None,
        max_tokens=arguments.max_tokens,
    )
    print(
        json.dumps({"report": arguments.out, "advice": words}) if arguments.json else f"wrote {arguments.out}. {words}"
    )
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--policy is empty. Give names separated by commas, such as lru,lfru.")
    return list(dict.fromkeys(names))


def _percents(text: str) -> list[float]:
    """Return numbers separated by commas, whole ones as int."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values:
        raise ConfigError(f"--residency {text!r} is no list of percent. Give numbers separated by commas: 15,25,35,45.")
    return [int(value) if value.is_integer() else value for value in dict.fromkeys(values)]


def _print_rows(rows: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells_of = _cost_cells if "share" in rows[0] else _hit_cells
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy")
    for name in list(cells_of(rows[0]))[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*cells_of(row).values())
    Console(file=sys.stdout).print(table)


def _hit_cells(row: dict) -> dict[str, str]:
    return {
        "policy": row["policy"],
        "residency": f"{row['residency']:g} %",
        "slots": f"{row['slots']}",
        "hit rate": f"{row['hit_rate']:.4f}",
        "hits": f"{row['hits']:,}",
        "accesses": f"{row['accesses']:,}",
    }


def _cost_cells(row: dict) -> dict[str, str]:
    wasted = f"{row['prefetch']['wasted_bytes'] / row['tokens'] / 1e6:.1f}" if "prefetch" in row else ""
    return {
        "policy": row.get("predictor", row["policy"]),
        "residency": f"{row['residency']:g} %",
        "hit rate": f"{row['hit_rate']:.4f}",
        "late": f"{row['late'] / row['accesses']:.4f}",
        "tok/s": f"{row['tokens_per_s']:.1f}",
        "share": f"{row['share']:.3f}",
        "wasted MB": wasted,
    }
