"""The figures of an answer: what happened since before it, as a line, as JSON and as a table."""

import json
import re
from dataclasses import fields, replace
from io import StringIO

from rich.console import Console

from moeflow.chat.answer import Answer
from moeflow.chat.figures import answer_figures, stats_line, stats_table
from moeflow.offload.stats import Decisions, PhaseStats, ReadStats, RuntimeStats

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
    """The snapshot of a runtime after `times` equal answers."""
    phase = PhaseStats(
        forwards=41 * times,
        tokens=41 * times,
        hits=71 * times,
        misses=29 * times,
        waited_for_prefetch=2 * times,
        evictions=20 * times,
        bytes_from_disk=106 * MIB * times,
        stall_s=0.5 * times,
        compute_s=1.25 * times,
        predict_s=0.25 * times,
        decisions=Decisions(read=27 * times),
    )
    return RuntimeStats(
        device="cpu",
        policy="lru",
        slots=120,
        num_experts=480,
        prefill=phase.copy(),
        decode=phase.copy(),
        memory={
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
        plan=None,
        miss=None,
        prediction=None,
        step={"mode": "native", "reason": None, "steps": 40},
        io=ReadStats(mode="direct", reads=58 * times, bytes=212 * MIB * times, read_s=0.125 * times, threads=4),
    )


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


def test_figures_survive_json():
    figures = json.loads(json.dumps(answer_figures(make_stats(1), make_stats(2), ANSWER)))
    assert figures["text"] == "hello"
    assert figures["moeflow"] == make_stats(1).as_dict()
    assert answer_figures(None, None, ANSWER)["moeflow"] is None


def test_table_shows_both_phases_and_the_memory():
    stats = make_stats(times=100)
    stats.prefill.hits = stats.prefill.misses = 0
    text = printed(stats_table(stats))
    assert "120 slots on cpu · 480 experts · policy lru" in text
    rows = {line[:22].strip(): line[22:].split("  ") for line in text.splitlines()}
    assert [cell.strip() for cell in rows["hit rate"] if cell.strip()] == ["–", "71 %"]
    assert [cell.strip() for cell in rows["hits"] if cell.strip()] == ["0", "7,100"]
    assert [cell.strip() for cell in rows["process"] if cell.strip()] == ["805 MiB", "900 MiB"]
    assert [cell.strip() for cell in rows["expert budget"] if cell.strip()] == ["318 MiB", "of 1.2 GiB"]
    assert [cell.strip() for cell in rows["waited for prefetch"] if cell.strip()] == ["200", "200"]
    assert [cell.strip() for cell in rows["predicting experts"] if cell.strip()] == ["25.0 s", "25.0 s"]
    assert re.search(r"direct reads, 4 threads +5,800 +20.7 GiB", text)


def test_no_counter_of_a_phase_is_left_out_of_the_table():
    whole = printed(stats_table(make_stats()))
    for counter in fields(PhaseStats):
        if counter.name != "decisions":
            stats = make_stats()
            setattr(stats.decode, counter.name, 10 * getattr(stats.decode, counter.name) + 1000)
            assert printed(stats_table(stats)) != whole, counter.name


def test_the_line_says_how_many_tokens_of_the_prompt_were_kept():
    answer = replace(ANSWER, num_prompt_tokens=1028, num_cached_tokens=1023)
    assert stats_line(None, None, answer) == "42 tok · 11.3 tok/s · TTFT 0.41 s · 1,023 of 1,028 prompt tokens kept"
    assert "kept" not in stats_line(None, None, ANSWER)
