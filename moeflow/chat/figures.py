"""The figures of an answer: the line below it, its JSON, and the table of a model's counters.

Knows snapshots of a runtime's counters. Knows nothing of models; imports neither torch nor rich at the top.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from moeflow.fit.contract import Contract, summary
from moeflow.formatting import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from moeflow.chat.answer import Answer
    from moeflow.offload.stats import RuntimeStats

_PHASES = ("prefill", "decode")


def answer_figures(before: RuntimeStats | None, after: RuntimeStats | None, answer: Answer) -> dict:
    """Return an answer and what it cost as one dict that `json.dumps` takes.

    Args:
        before: `model.moeflow.snapshot()` before the answer; None for a model that runs without moeflow.
        after: the same after it.
        answer: the answer.
    """
    figures = asdict(answer)
    figures["moeflow"] = None if before is None or after is None else (after - before).as_dict()
    return figures


def stats_line(before: RuntimeStats | None, after: RuntimeStats | None, answer: Answer) -> str:
    """Write the line that stands below an answer.

    Args:
        before: `model.moeflow.snapshot()` before the answer; None for a model that runs without moeflow.
        after: the same after it.
        answer: the answer.
    """
    parts = [f"{answer.num_new_tokens} tok"]
    if answer.tokens_per_s is not None:
        rate = answer.tokens_per_s
        parts.append(f"{rate:.1f} tok/s" if rate < 100 else f"{rate:.0f} tok/s")
    parts.append(f"TTFT {format_seconds(answer.ttft_s)}")
    if answer.num_cached_tokens:
        parts.append(f"{answer.num_cached_tokens:,} of {answer.num_prompt_tokens:,} prompt tokens kept")
    if before is not None and after is not None:
        cost = after - before
        memory = cost.memory
        if cost.decode.hit_rate is not None:
            parts.append(f"hit rate {format_percent(cost.decode.hit_rate)} (decode)")
        parts.append(f"{format_bytes(cost.io.bytes)} read")
        held, everything = format_bytes(memory["device_bytes"]), format_bytes(memory["all_experts_bytes"])
        parts.append(f"experts {held} of {everything}")
        if memory["host_bytes"]:
            parts.append(f"host {format_bytes(memory['host_bytes'])}")
        parts.append(f"process {format_bytes(memory['process_bytes'])}")
    if answer.stopped == "user":
        parts.append("stopped")
    elif answer.stopped == "length":
        parts.append("length limit reached")
    return " · ".join(parts)


def plan_lines(stats: RuntimeStats | None) -> str | None:
    """Write planned against actual, line by line, or both sides of a shared budget; None for a model without either.

    Args:
        stats: `model.moeflow.snapshot()` at the end of a chat.
    """
    if stats is not None and "shared_budget_bytes" in stats.memory:
        memory = stats.memory
        experts, values = format_bytes(memory["device_bytes"]), format_bytes(memory["key_value_bytes"])
        return f"experts {experts}, keys and values {values} now, of {format_bytes(memory['shared_budget_bytes'])}"
    if stats is None or not isinstance(stats.plan, Contract):
        return None
    return summary(stats.plan.told(stats.memory, stats.prefill, stats.decode))


def stats_table(stats: RuntimeStats) -> Table:
    """Lay a snapshot out as a table: the counters of prefill and decode, then the memory."""
    from rich import box
    from rich.table import Table

    title = f"{stats.slots} slots on {stats.device} · {stats.num_experts} experts · policy {stats.policy}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in ("", *_PHASES):
        table.add_column(heading, justify="right" if heading else "left")
    counters = [
        ("tokens", "tokens", "{:,}".format),
        ("forwards", "forwards", "{:,}".format),
        ("hit rate", "hit_rate", format_percent),
        ("hits", "hits", "{:,}".format),
        ("misses", "misses", "{:,}".format),
        ("waited for prefetch", "waited_for_prefetch", "{:,}".format),
        ("evictions", "evictions", "{:,}".format),
        ("read from disk", "bytes_from_disk", format_bytes),
        ("copied from host", "bytes_from_host", format_bytes),
        ("waiting for experts", "stall_s", format_seconds),
        ("computing experts", "compute_s", format_seconds),
        ("predicting experts", "predict_s", format_seconds),
        ("tokens of timed passes", "timed_tokens", "{:,}".format),
        ("time of those", "timed_s", format_seconds),
    ]
    for label, name, write in counters:
        table.add_row(label, *(write(getattr(phase, name)) for phase in (stats.prefill, stats.decode)))
    table.add_section()
    table.add_row("", "now", "peak", style="bold")
    memory, io = stats.memory, stats.io
    for label, name in (("device experts", "device"), ("host experts", "host"), ("process", "process")):
        table.add_row(label, format_bytes(memory[f"{name}_bytes"]), format_bytes(memory[f"{name}_peak_bytes"]))
    table.add_row("staging", format_bytes(memory["staging_bytes"]), "")
    table.add_section()
    budget, everything = format_bytes(memory["expert_budget_bytes"]), format_bytes(memory["all_experts_bytes"])
    table.add_row("expert budget", budget, f"of {everything}")
    if "shared_budget_bytes" in memory:
        values, peak, whole = (
            format_bytes(memory[name]) for name in ("key_value_bytes", "shared_peak_bytes", "shared_budget_bytes")
        )
        table.add_row("keys and values", values, "")
        table.add_row("all of these", f"of {whole}", peak)
    table.add_row(f"{io.mode} reads, {io.threads} threads", f"{io.reads:,}", format_bytes(io.bytes))
    return table
