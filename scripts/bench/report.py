"""Ratios, card and table of bench_decode."""

import statistics

from bench.engines import READ_THREADS
from bench.machine import describe, software
from bench.rounds import spread

OVERHEAD_LIMIT_BYTES = 550_000_000  # of a process beside its budget and the dense weights


def find_ratios(rows: list[dict], disk: dict | None) -> dict:
    """Return the named ratios; one that could not be measured says why."""
    by_name = {row["name"]: row for row in rows}
    ratios = {
        "capped: moeflow / llama.cpp": _ratio(by_name, "moeflow auto", "llama.cpp mmap f16", capped=True),
        "resident: moeflow / transformers eager": _ratio(by_name, "moeflow 100 %", "transformers eager", capped=False),
    }
    over = {row["name"]: row["over_budget_bytes"] / 1e6 for row in rows if "over_budget_bytes" in row}
    ratios["peak memory - (budget + dense)"] = (
        {"worst_mb": max(over.values()), "limit_mb": OVERHEAD_LIMIT_BYTES / 1e6, "rows": over}
        if over
        else {"missing": "no moeflow row"}
    )
    if disk is None or "error" in disk:
        read = {"missing": disk["error"] if disk else "moeflow was not measured"}
    else:
        turns = [a / b for a, b in zip(disk["store"], disk["plain"], strict=True)]
        medians = [statistics.median(disk[name]) for name in ("store", "plain")]
        read = {
            "ratio": medians[0] / medians[1],
            "rounds": turns,
            "store_bytes_per_s": medians[0],
            "plain_bytes_per_s": medians[1],
        }
    ratios["read bandwidth / plain O_DIRECT"] = read
    return ratios


def _ratio(by_name: dict, ours: str, theirs: str, capped: bool) -> dict:
    pair = [by_name.get(name) for name in (ours, theirs)]
    for name, row in zip((ours, theirs), pair, strict=True):
        if row is None or "rounds" not in row:
            return {"missing": f"{name}: {row['error'] if row else 'not measured'}"}
        if capped and not row["capped"]:
            return {"missing": "needs --cap, and a machine with memory cgroups"}
    rounds = [
        statistics.median(a) / statistics.median(b) for a, b in zip(*(row["rounds"] for row in pair), strict=False)
    ]
    return {"ratio": pair[0]["tokens_per_s"]["median"] / pair[1]["tokens_per_s"]["median"], "rounds": rounds}


def run_card(bench) -> dict:
    """Return the card of a `Bench` that has run: model, machine, versions, and how it is measured."""
    size, args = bench.size, bench.args
    return {
        "model": str(args.model),
        "num_experts": size.num_experts,
        "num_layers": size.num_layers,
        "num_experts_per_tok": size.num_experts_per_tok,
        "expert_bytes": size.expert_bytes,
        "token_bytes": size.token_bytes,
        "experts_bytes": size.experts_bytes,
        "dense_bytes": size.dense_bytes,
        **describe("moeflow", "torch", "transformers", "accelerate", "llama_cpp_python"),
        "disk_bytes_per_s": spread(bench.disk),
        "disk_mode": bench.disk_mode,
        "cap_bytes": bench.cap_bytes,
        "cap_refused": bench.cap_refused,
        "tokens": args.tokens,
        "prompt_tokens": len(bench.prompt),
    }


def card_lines(card: dict) -> dict[str, str]:
    """Return the lines of a card, by name."""
    disk, cap = card["disk_bytes_per_s"], "none"
    if card["cap_bytes"]:
        cap = f"{card['cap_bytes'] / 1e6:.0f} MB"
    elif card["cap_refused"]:
        cap = f"none ({card['cap_refused']})"
    counts = f"{card['num_experts']} experts in {card['num_layers']} layers, top-{card['num_experts_per_tok']}"
    expert, experts, dense = (card[f"{name}_bytes"] / 1e6 for name in ("expert", "experts", "dense"))
    sampled = f"{disk['min'] / 1e9:.2f} to {disk['max'] / 1e9:.2f} in {disk['n']} samples"
    depth = f"{card['disk_mode']} reads of an expert, {READ_THREADS} at a time"
    return {
        "model": f"{card['model']}: {counts}",
        "expert": f"{expert:.2f} MB; all {experts:.0f} MB; dense {dense:.0f} MB",
        "token": f"{card['token_bytes'] / 1e6:.1f} MB at 100 % miss",
        "machine": f"{card['cpu']}, {card['cores']} cores, {card['memory_bytes'] / 1e9:.0f} GB",
        "disk": f"{disk['median'] / 1e9:.2f} GB/s ({sampled}), {depth}",
        "ceiling": f"{disk['median'] / card['token_bytes']:.2f} tok/s if every expert came from the disk",
        "software": software(card),
        "run": f"{card['prompt_tokens']} tokens of prompt, {card['tokens']} of greedy decode, cap {cap}",
    }


def print_table(rows: list[dict], tokens: int) -> None:
    """Print the rows as a markdown table."""
    heads = [
        "engine",
        "tok/s (range, n)",
        "TTFT cold / warm s",
        "hit rate",
        "read MB/tok",
        "disk bound tok/s",
        "stall s",
    ]
    heads += ["peak RSS MB", "cgroup MB", "over budget MB", f"tokens as eager of {tokens}"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        name = row["name"] + (", capped" if row["capped"] else "")
        if "rounds" not in row:
            print(f"| {name} | {row['error']} |" + " - |" * (len(heads) - 2))
            continue
        speed = row["tokens_per_s"]
        cells = (
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f}, {speed['n']})"
            + (f", then: {row['error']}" if "error" in row else ""),
            f"{row['ttft_cold_s']['median']:.2f} / {row['ttft_warm_s']['median']:.2f}",
            _cell(row.get("hit_rate"), 1, 3),
            _cell(row["read_bytes_per_token"], 1e6, 1),
            _cell(row["disk_bound_tokens_per_s"], 1, 1),
            _cell(row.get("stall_s"), 1, 2),
            _cell(row["peak_bytes"], 1e6, 0),
            _cell(row["cgroup_peak_bytes"], 1e6, 0),
            _cell(row.get("over_budget_bytes"), 1e6, 0),
            _cell(row.get("tokens_as_reference"), 1, 0),
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_ratios(ratios: dict) -> None:
    """Print the named ratios."""
    for name, ratio in ratios.items():
        if "missing" in ratio:
            print(f"{name}: - ({ratio['missing']})")
        elif "worst_mb" in ratio:
            print(f"{name}: {ratio['worst_mb']:.0f} MB at worst, limit {ratio['limit_mb']:.0f} MB")
        else:
            print(f"{name}: {ratio['ratio']:.2f} (rounds {min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f})")
    print()


def _cell(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
