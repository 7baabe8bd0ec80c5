"""The figures of an answer: what happened since before it, as a line, as JSON and as a table."""

import json
import re
from io import StringIO

from rich.console import Console

from moeflow.chat.answer import Answer
from moeflow.chat.figures import answer_figures, stats_delta, stats_line, stats_table

MIB, GIB = 1024**2, 1024**3
ANSWER = Answer(
    text="hello",
    num_prompt_tokens=9,
    num_new_tokens=42,
    ttft_s=0.41,
    decode_s=3.63,
    tokens_per_s=11.3,
    stopped="eos",
)


def make_stats(times=1, host_bytes=0):
    """Counters in the shape `model.moeflow.stats()` returns them, as after `times` equal answers."""
    phase = {
        "tokens": 41 * times,
        "forwards": 41 * times,
        "hits": 71 * times,
        "misses": 29 * times,
        "hit_rate": 0.71 if times else None,
        "evictions": 20 * times,
        "bytes_from_disk": 106 * MIB * times,
        "bytes_from_host": 0,
        "stall_s": 0.5 * times,
        "compute_s": 1.25 * times,
        "decisions": {"resident": 71 * times, "read": 29 * times},
    }
    return {
        "slots": 120,
        "num_experts": 480,
        "policy": "lru",
        "device": "cpu",
        "prefill": dict(phase),
        "decode": dict(phase),
        "memory": {
            "expert_budget_bytes": 318 * MIB,
            "all_experts_bytes": int(1.24 * GIB),
            "device_bytes": 318 * MIB,
            "device_peak_bytes": 318 * MIB,
            "host_bytes": host_bytes,
            "host_peak_bytes": host_bytes,
            "staging_bytes": 4 * MIB,
            "process_bytes": 805 * MIB,
            "process_peak_bytes": 900 * MIB,
        },
        "io": {"mode": "direct", "reads": 58 * times, "bytes": 212 * MIB * times, "threads": 4},
    }


def printed(renderable, width=100):
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def test_line_counts_only_what_happened_since_before():
    assert stats_line(make_stats(times=3), make_stats(times=4), ANSWER) == (
        "42 tok · 11.3 tok/s · TTFT 0.41 s · hit rate 71 % (decode) · 212 MiB read · "
        "experts 318 MiB of 1.2 GiB · process 805 MiB"
    )


def test_line_of_a_model_without_moeflow_has_only_timing():
    assert stats_line(None, None, ANSWER) == "42 tok · 11.3 tok/s · TTFT 0.41 s"


def test_line_leaves_out_rates_of_which_nothing_was_counted():
    one_token = Answer("x", 9, 1, 0.41, 0.0, None, "length")
    unchanged = make_stats(times=3)
    assert stats_line(unchanged, unchanged, one_token) == (
        "1 tok · TTFT 0.41 s · 0 B read · experts 318 MiB of 1.2 GiB · process 805 MiB · length limit reached"
    )


def test_line_names_the_host_tier_only_where_there_is_one():
    assert " · host 2 GiB · " in stats_line(make_stats(0), make_stats(1, host_bytes=2 * GIB), ANSWER)


def test_delta_leaves_both_inputs_alone_and_recomputes_the_hit_rate():
    before, after = make_stats(times=1), make_stats(times=3)
    after["decode"]["hits"] = before["decode"]["hits"]
    delta = stats_delta(before, after)
    assert delta["decode"]["decisions"] == {"resident": 142, "read": 58}
    assert delta["decode"]["hit_rate"] == 0
    assert delta["prefill"]["hit_rate"] == 0.71
    assert delta["io"] == {"mode": "direct", "reads": 116, "bytes": 424 * MIB, "threads": 4}
    assert before == make_stats(times=1)
    assert after["io"] == make_stats(times=3)["io"]


def test_figures_survive_json():
    figures = json.loads(json.dumps(answer_figures(make_stats(0), make_stats(1), ANSWER)))
    assert figures["text"] == "hello"
    assert figures["moeflow"]["decode"]["hits"] == 71
    assert answer_figures(None, None, ANSWER)["moeflow"] is None


def test_table_shows_both_phases_and_the_memory():
    stats = make_stats(times=100)
    stats["prefill"]["hit_rate"] = None
    text = printed(stats_table(stats))
    assert "120 slots on cpu · 480 experts · policy lru" in text
    rows = {line[:22].strip(): line[22:].split("  ") for line in text.splitlines()}
    assert [cell.strip() for cell in rows["hit rate"] if cell.strip()] == ["–", "71 %"]
    assert [cell.strip() for cell in rows["hits"] if cell.strip()] == ["7,100", "7,100"]
    assert [cell.strip() for cell in rows["process"] if cell.strip()] == ["805 MiB", "900 MiB"]
    assert [cell.strip() for cell in rows["expert budget"] if cell.strip()] == ["318 MiB", "of 1.2 GiB"]
    assert re.search(r"direct reads, 4 threads +5,800 +20.7 GiB", text)
