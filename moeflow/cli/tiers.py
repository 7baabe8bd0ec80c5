"""`moeflow tiers`: the experts to keep on one GPU, in host memory and on disk, compared with a cache."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypedDict

from moeflow.cli.place_problem import known_top_k
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from moeflow.placement.tiers import TierPlan
    from moeflow.placement.workload import Workload
    from moeflow.trace.trace import RoutingTrace

_CACHE_POLICIES = ("lru", "lfu", "lfru")  # what load_moe can run
_BOUND_POLICY = "belady"


class _Sizes(TypedDict):
    """How large an expert is and how fast it comes."""

    expert_bytes: int
    host_bytes_per_s: float
    disk_bytes_per_s: float


def add_tiers_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's commands."""
    tiers = commands.add_parser("tiers", help="which experts to keep on one GPU; a fixed choice against a cache")
    tiers.add_argument("workload", metavar="TRACE_OR_COUNTS", help="trace, gpt-oss folder or count file")
    tiers.add_argument("--gpu-memory", required=True, metavar="M", help='what experts may take of it: "6GiB" or "25%%"')
    tiers.add_argument("--expert-mb", type=float, required=True, metavar="MB", help="megabytes of one expert")
    tiers.add_argument("--host-memory", metavar="M", help="likewise; without it, all experts fit")
    tiers.add_argument("--host-gb-s", type=float, default=20, metavar="GB", help="gigabytes a second to the GPU (20)")
    tiers.add_argument("--disk-gb-s", type=float, default=2, metavar="GB", help="gigabytes a second from disk (2)")
    tiers.add_argument("--top-k", type=int, metavar="K", help="experts a token takes, where counts do not say")
    tiers.add_argument("--hold-out", type=int, metavar="N", help="judge on every Nth sequence, choose on the others")
    tiers.add_argument("--json", action="store_true", help="print one JSON object, with every expert's tier")
    tiers.set_defaults(run=_tiers)


def _tiers(arguments: argparse.Namespace) -> int:
    from moeflow.placement.tiers import choose_tiers, judge_tiers
    from moeflow.trace.workloads import is_count_file, opened_routes

    sizes = _sizes(arguments)
    if arguments.hold_out is not None and is_count_file(arguments.workload):
        raise ConfigError(f"--hold-out splits a trace, and {arguments.workload} holds counts. Leave it out.")
    with nullcontext() if is_count_file(arguments.workload) else opened_routes(arguments.workload) as trace:
        workload, judged, numbers = _workloads(arguments, trace)
        gpu_bytes, host_bytes = _budgets(arguments, workload)
        top_k = known_top_k(arguments.top_k, [workload])
        if top_k is None:
            raise ConfigError("the counts do not say how many experts a token takes: give --top-k.")
        plan = choose_tiers(workload, gpu_bytes=gpu_bytes, host_bytes=host_bytes, top_k=top_k, **sizes)
        if judged is not workload:
            plan = judge_tiers(plan, judged, top_k=top_k, **sizes)
        slots = int((plan.tier == 0).sum())
        caches = {} if trace is None or numbers is None or plan.hit_rate >= 1 else _replayed(trace, numbers, slots)
    about = _about(plan, sizes, judged, caches)
    if arguments.json:
        print(json.dumps(about | {"tiers": _names(plan)}))
    else:
        _print(about, plan, trace is not None)
    return 0


def _sizes(arguments: argparse.Namespace) -> _Sizes:
    values = {
        "--expert-mb": arguments.expert_mb,
        "--host-gb-s": arguments.host_gb_s,
        "--disk-gb-s": arguments.disk_gb_s,
    }
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g} is out of range. Give a number above 0.")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise ConfigError(f"--top-k {arguments.top_k} is out of range. Give at least 1.")
    return {
        "expert_bytes": round(arguments.expert_mb * 1e6),
        "host_bytes_per_s": arguments.host_gb_s * 1e9,
        "disk_bytes_per_s": arguments.disk_gb_s * 1e9,
    }


def _workloads(
    arguments: argparse.Namespace, trace: RoutingTrace | None
) -> tuple[Workload, Workload, np.ndarray | None]:
    """Return the workloads to choose by and to judge on, and the sequences of the latter; None without a trace."""
    import numpy as np

    from moeflow.trace.workloads import counted, held_out_sequences, kept_sequences, read_workload

    if trace is None:
        workload = read_workload(arguments.workload)
        return workload, workload, None
    kept = kept_sequences(trace)
    if arguments.hold_out is None:
        workload = counted(trace, arguments.workload, kept)
        return workload, workload, kept
    held_out = held_out_sequences(trace, arguments.hold_out)
    seen = counted(trace, arguments.workload, np.setdiff1d(kept, held_out))
    return seen, counted(trace, f"{arguments.workload}, held out", held_out), held_out


def _budgets(arguments: argparse.Namespace, workload: Workload) -> tuple[int, float]:
    from moeflow.memory_size import parse_memory

    whole = round(workload.load.size * arguments.expert_mb * 1e6)
    gpu = parse_memory(arguments.gpu_memory, name="--gpu-memory", whole_bytes=whole)
    if arguments.host_memory is None:
        return gpu, float("inf")
    return gpu, parse_memory(arguments.host_memory, name="--host-memory", whole_bytes=whole)


def _replayed(trace: RoutingTrace, numbers: np.ndarray, num_slots: int) -> dict[str, float]:
    """Return the hit rate of each cache of so many slots; a sequence begins with the cache that the last one left."""
    from moeflow.cli.progress import count_progress
    from moeflow.replay.demand import replay, sequence_rows

    experts, starts = sequence_rows(trace.select(numbers), "all")
    policies = (*_CACHE_POLICIES, _BOUND_POLICY)
    rates = {}
    with count_progress("replaying caches") as progress:
        for number, policy in enumerate(policies):
            progress(number, len(policies))
            rates[policy] = replay(experts, trace.num_experts, starts, num_slots, policy, warm=True).hit_rate
        progress(len(policies), len(policies))
    return rates


def _about(plan: TierPlan, sizes: _Sizes, judged: Workload, caches: dict[str, float]) -> dict:
    from moeflow.placement.tiers import TIERS, static_or_dynamic

    counts = [int((plan.tier == tier).sum()) for tier in range(3)]
    about = {
        "judged_on": judged.name,
        "expert_bytes": sizes["expert_bytes"],
        "tiers_of": [
            {"tier": name, "experts": count, "bytes": count * sizes["expert_bytes"], "share": share}
            for name, count, share in zip(TIERS, counts, plan.rates, strict=True)
        ],
        "hit_rate": {"static": plan.hit_rate, **caches},
        "s_per_token": {"static": plan.s_per_token},
        "best": "static",
    }
    if caches:
        advice = static_or_dynamic(plan, caches)
        real = static_or_dynamic(plan, {name: caches[name] for name in _CACHE_POLICIES})
        about |= {"s_per_token": advice.s_per_token, "best": real.best, "saved_s_per_token": real.saved_s_per_token}
    return about


def _names(plan: TierPlan) -> list[list[str]]:
    from moeflow.placement.tiers import TIERS

    return [[TIERS[tier] for tier in layer] for layer in plan.tier.tolist()]


def _print(about: dict, plan: TierPlan, has_trace: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from moeflow.formatting import format_bytes

    console = Console(highlight=False)
    tiers = Table("tier", box=box.SIMPLE_HEAD)
    for name in ("experts", "bytes", "of what tokens take"):
        tiers.add_column(name, justify="right")
    for row in about["tiers_of"]:
        tiers.add_row(row["tier"], f"{row['experts']:,}", format_bytes(row["bytes"]), f"{row['share']:.1%}")
    console.print(tiers)
    choices = Table("on the GPU", box=box.SIMPLE_HEAD)
    for name in ("hit rate", "ms a token waits"):
        choices.add_column(name, justify="right")
    names = {"static": "static: always the same", _BOUND_POLICY: "belady: no cache hits more"}
    for name, rate in about["hit_rate"].items():
        choices.add_row(names.get(name, name), f"{rate:.4f}", f"{about['s_per_token'][name] * 1000:.1f}")
    console.print(choices)
    print(_advice(about, plan, has_trace))


def _advice(about: dict, plan: TierPlan, has_trace: bool) -> str:
    if plan.hit_rate >= 1:
        return "every expert that is used stays on the GPU: nothing needs to move."
    if not has_trace:
        return "counts do not say in which order tokens come: give a trace to compare with caches."
    saved = 1000 * about["saved_s_per_token"]
    if about["best"] == "static":
        return f"keep these experts on the GPU: the best cache would wait {-saved:.1f} ms a token longer."
    return f"let the cache {about['best']} move experts: it saves {saved:.1f} ms a token over the best fixed choice."
