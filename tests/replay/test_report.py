"""The report: what the page says, what it leaves out, the advice."""

import json
import re

import pytest

from helpers.trace_files import write_skewed_trace
from moeflow.replay.measured import read_realised
from moeflow.replay.report import advice, write_report
from moeflow.trace.trace import RoutingTrace

MEASURED = {
    "rows": [{"policy": "forecast", "residency": 25, "hit_rate": 0.5}],
    "recall_by_distance": {"markov": {"1": 0.6, "2": 0.5}},
    "wasted_bytes": {"forecast": 2048},
    "timeliness": 0.75,
}


@pytest.fixture
def trace_file(tmp_path):
    return write_skewed_trace(tmp_path / "t.trace")


def curve(*rates, policy="lfru"):
    return [
        {"policy": policy, "residency": 25 * (n + 1), "slots": 6 * (n + 1), "hit_rate": rate}
        for n, rate in enumerate(rates)
    ]


def test_report_is_one_page_without_network_and_with_nothing_unescaped(trace_file, tmp_path):
    out = tmp_path / "r.html"
    words = write_report(RoutingTrace.open(trace_file), out)
    page = out.read_text()
    assert words in page
    assert "&lt;script&gt;evil" in page
    assert "<script" not in page
    links = re.findall(r'(?:href|src)="([^"]{1,20})', page) + re.findall(r"url\((.{5})", page)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2
    assert {file.name for file in tmp_path.iterdir()} == {"t.trace", "r.html"}


@pytest.mark.slow
def test_sections_of_what_was_realised_stand_only_where_it_was(trace_file, tmp_path):
    out, measured = tmp_path / "r.html", tmp_path / "m.json"
    trace = RoutingTrace.open(trace_file)
    titles = ("Recall by distance", "Timeliness", "Wasted bytes", "Realised")
    write_report(trace, out)
    assert not [title for title in titles if title in out.read_text()]
    measured.write_text(json.dumps(MEASURED["rows"]))
    write_report(trace, out, realised=read_realised(measured))
    assert [title for title in titles if title in out.read_text()] == ["Realised"]
    measured.write_text(json.dumps(MEASURED))
    write_report(trace, out, realised=read_realised(measured))
    page = out.read_text()
    assert not [title for title in titles if title not in page]
    assert "2 KiB" in page
    assert "75.0%" in page
    assert page.count("<svg") == 3


def test_report_says_how_much_of_a_long_trace_it_replayed(trace_file, tmp_path):
    out = tmp_path / "r.html"
    write_report(RoutingTrace.open(trace_file), out, max_tokens=100)
    page = out.read_text()
    assert "200 tokens in 4 sequences" in page
    assert "100 decode tokens, in 2 sequences" in page


def test_advice_is_the_smallest_residency_after_which_nothing_pays():
    rows = curve(0.5, 0.8, 0.81, 0.82)
    assert advice(rows, 24).startswith("Buy 50 % residency (12 of 24 experts): LFRU on demand hits 80.0%")
    assert "12 of 24 experts, 12 MiB)" in advice(rows, 24, 2**20)
    assert advice(curve(0.5, 0.51, 0.8, 0.81), 24).startswith("Buy 75 %")
    assert "would hit 90.0%" in advice(rows + curve(0.7, 0.9, 0.9, 0.9, policy="belady"), 24)


def test_advice_names_no_knee_where_there_is_none():
    assert "up to 100 % (24 of 24 experts): the last" in advice(curve(0.25, 0.5, 0.75, 1.0), 24)
