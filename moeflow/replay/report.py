"""`moeflow trace report`: one HTML file about a trace, for light and dark screens, without network.

It shows the trace's facts, hit rates of caches, locality of routing, the residency to buy, and, from a file, figures
measured with prediction and prefetch.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from moeflow.atomic_file import check_target, write_atomically
from moeflow.errors import ConfigError
from moeflow.formatting import format_bytes, format_percent
from moeflow.replay.demand import replay_trace, sequence_rows
from moeflow.replay.measured import Realised
from moeflow.replay.plots import heat_map_figure, hit_rate_figure, page_svg, recall_figure, require_matplotlib
from moeflow.trace.locality import Locality, demand_by_expert, measure_locality
from moeflow.trace.trace import RoutingTrace

POLICIES = ("lru", "lfu", "lfru", "belady")
STEP_PERCENT = 5  # of all experts
WORTH_POINTS = 2.0  # percentage points of hit rate that STEP_PERCENT more residency must buy


def write_report(
    trace: RoutingTrace,
    out: str | Path,
    *,
    realised: Realised | None = None,
    phase: str = "decode",
    expert_bytes: int | None = None,
    max_tokens: int = 20_000,
) -> str:
    """Write the report, whole or not at all.

    Args:
        trace: the routing.
        out: HTML file to write.
        realised: figures measured elsewhere.
        phase: "decode", or "all" for prompts too.
        expert_bytes: bytes of one expert, for the advice.
        max_tokens: of a longer trace, evenly spread sequences of about so many tokens are replayed.

    Returns:
        The advice: one or two sentences on the residency to buy.

    Raises:
        ConfigError: nothing to replay, matplotlib is absent, or the file cannot be written.
    """
    require_matplotlib()  # before the work, not after it
    check_target(out, ConfigError)
    sample = _sample(trace, max_tokens)
    experts, starts = sequence_rows(sample, phase)
    rows = replay_trace(sample, _residencies(trace), list(POLICIES), phase=phase)
    words = advice(rows, sum(trace.experts_per_layer), expert_bytes)
    locality = measure_locality(experts, starts, trace.experts_per_layer)
    heat_map = heat_map_figure(demand_by_expert(experts, trace.experts_per_layer))
    sections = [
        ("", _about(trace, len(experts), len(starts) - 1, phase)),
        ("What to buy", f"<p class=advice>{escape(words)}</p>"),
        ("Hit rate over residency", _hit_rates(rows, realised)),
        *_realised_sections(realised),
        ("Where the demand goes", page_svg(heat_map, "Demand by layer and expert")),
        ("Locality", _locality(locality, trace)),
    ]
    page = _page(f"Routing of {trace.fingerprint}", sections)
    write_atomically(out, page, ConfigError)
    return words


def advice(rows: list[dict], num_experts: int, expert_bytes: int | None = None, policy: str = "lfru") -> str:
    """Say which residency to buy: the smallest after which no further step is worth its memory.

    Args:
        rows: as `replay_trace` returns them.
        num_experts: in all layers.
        expert_bytes: bytes of one expert.
        policy: whose curve decides; the live cache's default.
    """
    curve = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["residency"])
    bound = {row["residency"]: row["hit_rate"] for row in rows if row["policy"] == "belady"}
    gains = [100 * (after["hit_rate"] - before["hit_rate"]) for before, after in pairwise(curve)]
    knee = len(curve) - 1
    while knee and gains[knee - 1] < WORTH_POINTS:
        knee -= 1
    row = curve[knee]
    size = f"{row['slots']} of {num_experts} experts"
    if expert_bytes is not None:
        size += f", {format_bytes(row['slots'] * expert_bytes)}"
    residency = row["residency"]
    if knee == len(curve) - 1:
        return (
            f"Buy as much residency as you can, up to {residency:g} % ({size}): the last {STEP_PERCENT} % of the "
            f"experts still buys {gains[-1] if gains else 0:.1f} points of hit rate, "
            "so no smaller size is a place to stop at."
        )
    words = (
        f"Buy {residency:g} % residency ({size}): {policy.upper()} on demand hits {row['hit_rate']:.1%} there, and no "
        f"further {STEP_PERCENT} % of the experts buys {WORTH_POINTS:g} points (the next buys {gains[knee]:.1f})."
    )
    if residency in bound:
        words += (
            f" The best possible order of evictions would hit {bound[residency]:.1%}; "
            "what lies above that only prefetch can win."
        )
    return words


def _residencies(trace: RoutingTrace) -> list[int]:
    least = 100 * trace.top_k / sum(trace.experts_per_layer)
    return [residency for residency in range(STEP_PERCENT, 101, STEP_PERCENT) if residency >= least]


def _sample(trace: RoutingTrace, max_tokens: int) -> RoutingTrace:
    """Return every n-th sequence, so that about max_tokens rows remain."""
    if len(trace) <= max_tokens:
        return trace
    numbers = trace.sequence_numbers
    return trace.select(numbers[:: max(1, round(len(trace) / max_tokens))])


def _about(trace: RoutingTrace, num_tokens: int, num_sequences: int, phase: str) -> str:
    sizes = sorted(set(trace.experts_per_layer))
    experts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    which = "decode tokens" if phase == "decode" else "tokens, prompts included"
    facts = [
        ("model", trace.fingerprint),
        ("source", trace.format.source or "not said"),
        ("MoE layers", f"{trace.num_layers}"),
        ("experts a layer", f"{experts}, of which a token takes {trace.top_k}"),
        ("in the trace", f"{len(trace):,} tokens in {len(trace.sequence_numbers):,} sequences"),
        ("in this report", f"{num_tokens:,} {which}, in {num_sequences:,} sequences; each starts with an empty cache"),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def _hit_rates(rows: list[dict], realised: Realised | None) -> str:
    measured = realised.rows if realised else []
    residencies = sorted({row["residency"] for row in rows})
    curves = {policy: {r["residency"]: r for r in rows if r["policy"] == policy} for policy in POLICIES}
    lines = [
        [f"{residency:g} %", f"{curves['lru'][residency]['slots']}"]
        + [f"{curves[policy][residency]['hit_rate']:.1%}" for policy in POLICIES]
        for residency in residencies
    ]
    names = ["LRU", "LFU", "LFRU", "Belady"]
    text = (
        "<p>One pool of slots for all layers, filled on demand and never ahead of it. Belady evicts with the future "
        "known: no order of evictions hits more. What even 100 % misses are first uses. The dashed line is what any "
        "cache hits when routing is random.</p>"
    )
    table = _table(["residency", "slots", *names], lines)
    if measured:
        measured_lines = [[row["policy"], f"{row['residency']:g} %", f"{row['hit_rate']:.1%}"] for row in measured]
        table += "<h3>Realised</h3>" + _table(["policy", "residency", "hit rate"], measured_lines)
    figure = page_svg(hit_rate_figure(rows, measured), "Hit rate over residency")
    return f"{text}{figure}<details><summary>as a table</summary>{table}</details>"


def _realised_sections(realised: Realised | None) -> list[tuple[str, str]]:
    if realised is None:
        return []
    sections = []
    if realised.recall_by_distance:
        figure = page_svg(recall_figure(realised.recall_by_distance), "Recall by distance")
        sections.append(("How far ahead the experts are known", figure))
    if realised.timeliness:
        lines = [[name, f"{share:.1%}"] for name, share in realised.timeliness.items()]
        text = "<p>Share of the useful prefetches that arrived before their layer ran.</p>"
        sections.append(("Timeliness", text + _table(["", "in time"], lines)))
    if realised.wasted_bytes:
        lines = [[name, format_bytes(round(wasted))] for name, wasted in realised.wasted_bytes.items()]
        text = "<p>Bytes of experts that were prefetched and evicted, or dropped, before anything used them.</p>"
        sections.append(("Wasted bytes", text + _table(["", "wasted"], lines)))
    return sections


def _locality(locality: Locality, trace: RoutingTrace) -> str:
    lines = [
        [f"{back} token{'s' if back > 1 else ''} back", format_percent(share), format_percent(locality.chance[back])]
        for back, share in locality.reuse.items()
    ]
    reuse = (
        "<p>Of the experts that a token demands, how many one of the tokens just before it in its sequence demanded in "
        "the same layer.</p>" + _table(["within", "demanded again", "were routing random"], lines)
    )
    quarter = locality.hottest_quarter
    most, least = int(np.argmax(quarter)), int(np.argmin(quarter))
    idle = "Every expert is demanded at least once."
    if locality.idle:
        idle = f"Nothing demands {locality.idle} of the {sum(trace.experts_per_layer)} experts."
    skew = (
        f"<p>The most demanded quarter of a layer's experts takes {format_percent(float(np.median(quarter)))} of its "
        f"demand (median; 25 % were it even), from {format_percent(float(quarter[least]))} in layer {least} to "
        f"{format_percent(float(quarter[most]))} in layer {most}. {idle}</p>"
    )
    return reuse + skew


def _table(header: list[str], lines: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page(title: str, sections: list[tuple[str, str]]) -> str:
    body = "".join(f"<section>{f'<h2>{name}</h2>' if name else ''}{content}</section>\n" for name, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --ink: #1b1c1e; --paper: #ffffff; --line: #8c8d8f55; --card: #f2f5f8;
  --blue: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --paper: #15171a; --card: #20242a;
  --blue: #4aa3e0; } }
body { margin: 2rem auto; max-width: 46rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.advice { background: var(--card); border-left: .3rem solid var(--blue); padding: .8rem 1rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; }
"""
