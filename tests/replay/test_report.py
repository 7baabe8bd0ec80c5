"""The report and its commands: what the page says, what it leaves out, the advice, refused files."""

import argparse
import json
import re

import numpy as np
import pytest

from moeflow.cli.replay import add_replay_commands
from moeflow.errors import ConfigError
from moeflow.replay.measured import read_realised
from moeflow.replay.report import advice, write_report
from moeflow.trace.locality import demand_by_expert, measure_locality
from moeflow.trace.trace import DECODE, RoutingTrace, TraceFormat, TraceWriter

MEASURED = {
    "rows": [{"policy": "forecast", "residency": 25, "hit_rate": 0.5}],
    "recall_by_distance": {"markov": {"1": 0.6, "2": 0.5}},
    "wasted_bytes": {"forecast": 2048},
    "timeliness": 0.75,
}


@pytest.fixture
def trace_file(tmp_path):
    """A skewed trace of 3 layers x 8 experts, 4 sequences of 50 tokens; its model's name is hostile."""
    rng = np.random.default_rng(0)
    odds = np.array([8, 4, 2, 1, 1, 1, 1, 1]) / 19
    path = tmp_path / "t.trace"
    with TraceWriter(path, TraceFormat((8, 8, 8), 2, "<script>evil</script>", has_weights=False)) as writer:
        rows = writer.new_rows(200)
        rows["experts"] = [[rng.choice(8, 2, False, odds) for _ in range(3)] for _ in range(200)]
        rows["sequence"], rows["phase"] = np.arange(200) // 50, DECODE
        writer.write(rows)
    return path


def run(*words):
    parser = argparse.ArgumentParser()
    add_replay_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


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


def test_sections_of_what_was_realised_stand_only_where_it_was(trace_file, tmp_path):
    out, measured = tmp_path / "r.html", tmp_path / "m.json"
    titles = ("Recall by distance", "Timeliness", "Wasted bytes", "Realised")
    run("report", trace_file, "-o", out)
    assert not [title for title in titles if title in out.read_text()]
    measured.write_text(json.dumps(MEASURED["rows"]))
    run("report", trace_file, "-o", out, "--realised", measured)
    assert [title for title in titles if title in out.read_text()] == ["Realised"]
    measured.write_text(json.dumps(MEASURED))
    run("report", trace_file, "-o", out, "--realised", measured)
    page = out.read_text()
    assert not [title for title in titles if title not in page]
    assert "2 KiB" in page
    assert "75.0%" in page
    assert page.count("<svg") == 3


def test_report_says_how_much_of_a_long_trace_it_replayed(trace_file, tmp_path):
    out = tmp_path / "r.html"
    run("report", trace_file, "-o", out, "--max-tokens", 100)
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


def test_reuse_is_counted_within_sequences_and_layers():
    first, second = [[[0, 1], [4, 5]], [[0, 2], [4, 5]], [[0, 1], [6, 7]]], [[[0, 5], [6, 7]], [[0, 1], [4, 5]]]
    locality = measure_locality(np.array(first + second), np.array([0, 3, 5]), (8, 8), distances=(1, 2))
    # Three rows have a token before them: 12 demands, of which 0, 4, 5, 0 and 0 come back at once, 1 from two back.
    assert locality.reuse == {1: 5 / 12, 2: 6 / 12}
    assert locality.chance[1] == pytest.approx(1 / 4)
    assert locality.chance[2] == pytest.approx((8 * 1 / 4 + 4 * (1 - 0.75**2)) / 12)
    assert locality.hottest_quarter.tolist() == [8 / 10, 6 / 10]
    assert locality.idle == 4 + 4


def test_demand_leaves_out_padding_and_experts_that_do_not_exist():
    demand = demand_by_expert(np.array([[[0, 1], [0, 255]], [[2, 1], [1, 0]]]), (3, 2))
    np.testing.assert_array_equal(demand, [[1, 2, 1], [2, 1, np.nan]])


def test_replay_command_prints_rows_and_plots(trace_file, tmp_path, capsys):
    plot, heat_map = tmp_path / "a.svg", tmp_path / "b.png"
    words = ("replay", trace_file, "--residency", "25,50,12.5", "--policy", "lru, belady,lru", "--json")
    assert run(*words, "--plot", plot, "--heat-map", heat_map) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["residency"], row["slots"]) for row in rows] == [
        ("lru", 25, 6), ("lru", 50, 12), ("lru", 12.5, 3), ("belady", 25, 6), ("belady", 50, 12), ("belady", 12.5, 3),
    ]  # fmt: skip
    assert plot.stat().st_size
    assert heat_map.stat().st_size
    run(*words[:-1])
    assert f"{rows[0]['hit_rate']:.4f}" in capsys.readouterr().out


def test_replay_options_reach_the_replay(trace_file, capsys):
    hits = []
    for options in ([], ["--warm"], ["--per-layer"]):
        run("replay", trace_file, "--policy", "lru", "--residency", 50, "--json", *options)
        hits.append(json.loads(capsys.readouterr().out)[0]["hits"])
    assert hits[1] > hits[0]
    assert hits[2] != hits[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--residency", "a"], "no list of percent"),
        (["--residency", "nan"], "out of range"),
        (["--policy", ","], "--policy is empty"),
        (["--plot", "a.pdf"], "ends in .png or .svg"),
    ],
)
def test_bad_replay_options_are_named(trace_file, options, words):
    with pytest.raises(ConfigError, match=words):
        run("replay", trace_file, *options)


@pytest.mark.parametrize(("option", "value"), [("--max-tokens", 0), ("--expert-mb", -1), ("--expert-mb", "nan")])
def test_bad_report_options_are_named(trace_file, tmp_path, option, value):
    with pytest.raises(ConfigError, match=option):
        run("report", trace_file, "-o", tmp_path / "r.html", option, value)
    assert not (tmp_path / "r.html").exists()


def test_measured_values_without_a_name_stand_for_all(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"recall_by_distance": {"1": 0.5}, "wasted_bytes": 7}))
    realised = read_realised(path)
    assert realised.recall_by_distance == {"all": {"1": 0.5}}
    assert realised.wasted_bytes == {"all": 7}
    path.write_text(json.dumps(MEASURED["rows"]))
    assert read_realised(path).rows == MEASURED["rows"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("3", "holds a int"),
        ('{"rows": 3}', "rows of .* is a int"),
        ('[{"policy": "a", "residency": 15, "hit_rate": 1.5}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15, "hit_rate": NaN}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15, "hit_rate": -0.5}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15}]', "row 0 of"),
        ('{"recall_by_distance": 3}', "recall_by_distance in .* is a int"),
        ('{"recall_by_distance": {"a": {"near": 0.5}}}', "recall_by_distance of 'a'"),
        ('{"wasted_bytes": {"a": "much"}}', "wasted_bytes in"),
        ('{"timeliness": 2}', "timeliness in"),
    ],
)
def test_malformed_measurements_are_named(tmp_path, content, words):
    path = tmp_path / "m.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_realised(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_realised(tmp_path / "none.json")
