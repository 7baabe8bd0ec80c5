"""`moeflow trace replay` as a user types it: rows, plots, a machine, and options that do not go together."""

import json

import pytest

from helpers.link_traces import K, L, write_random_trace
from helpers.trace_files import write_skewed_trace
from moeflow.cli.main import main
from moeflow.replay.link import LinkModel
from moeflow.replay.machine import replay_machine, replayed_places
from moeflow.trace.trace import RoutingTrace

MACHINE = ["--link-gb-s", "1", "--expert-mb", "2", "--layer-ms", "3"]


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    return write_random_trace(tmp_path_factory.mktemp("machine") / "t")


def replay_json(capsys, trace_file, *options):
    assert main(["trace", "replay", str(trace_file), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_adds_a_predictors_row_and_costs(trace_file, capsys):
    options = [*MACHINE, "--residency", "25,50", "--policy", "lru,best-order", "--predictor", "clairvoyant"]
    rows = replay_json(capsys, trace_file, *options)
    assert [row["policy"] for row in rows] == ["lru"] * 2 + ["best-order"] * 2 + ["forecast"] * 2
    trace = RoutingTrace.open(trace_file)
    for row in rows:
        predictor = "clairvoyant" if row["policy"] == "forecast" else None
        link = LinkModel(2_000_000, 1e9, 3e-3)
        assert row == replay_machine(trace, row["residency"], row["policy"], link, predictor=predictor)
    assert "prefetch" in rows[-1]


def test_a_predictor_is_measured_on_held_out_sequences_alone(trace_file, capsys):
    row = replay_json(capsys, trace_file, *MACHINE, "--residency", "50", "--predictor", "markov")[-1]
    assert row["tokens"] == 16  # the fifth sequence
    assert replayed_places(RoutingTrace.open(trace_file), "clairvoyant", None) == list(range(6))
    assert replayed_places(RoutingTrace.open(trace_file), None, 3, 1) == [2]
    assert replay_json(capsys, trace_file, "--hold-out", "3")[0]["accesses"] == (14 + 17) * L * K
    assert replay_json(capsys, trace_file, "--limit", "1")[0]["accesses"] == 12 * L * K


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--predictor", "markov"], "--predictor works on a machine. Give it: --link-gb-s"),
        (["--in-flight", "2"], "--in-flight works on a machine"),
        (["--layer-ms", "1"], "--layer-ms alone is no machine"),
        ([*MACHINE[:-1], "0"], "--layer-ms 0 is out of range"),
        ([*MACHINE[:-1], "nan"], "--layer-ms nan is out of range"),
        ([*MACHINE, "--warm"], "--warm does not go with --link-gb-s"),
        ([*MACHINE, "--per-layer"], "--per-layer does not go with"),
        ([*MACHINE, "--phase", "all"], "--phase all does not go with"),
        ([*MACHINE, "--in-flight", "2"], "without --predictor there are none"),
        ([*MACHINE, "--in-flight", "0", "--predictor", "markov"], "--in-flight 0 prefetches nothing"),
        ([*MACHINE, "--policy", "forecast"], "give a predictor"),
        ([*MACHINE, "--policy", "lru,best"], "policy 'best' is unknown. Allowed: lru, lfu"),
        ([*MACHINE, "--predictor", "markov", "--hold-out", "3"], "it knows some of those. Give 5"),
        ([*MACHINE, "--predictor", "lookahead"], "holds no lookahead"),
        ([*MACHINE, "--predictor", "markov", "--residency", "50,3"], "The minimum is 6.25 %"),
        ([*MACHINE, "--predictor", "absent"], "cannot be read as a predictor"),
        (["--limit", "0"], "a limit of 0 sequences replays nothing"),
        (["--hold-out", "7"], "too few to hold out every 7th"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trace_file, capsys, options, told):
    assert main(["trace", "replay", str(trace_file), *options]) == 1
    assert told in capsys.readouterr().err


def test_the_table_shows_costs(trace_file, capsys):
    assert main(["trace", "replay", str(trace_file), *MACHINE, "--residency", "50", "--predictor", "clairvoyant"]) == 0
    shown = capsys.readouterr().out
    assert "tok/s" in shown
    assert "clairvoyant" in shown


@pytest.fixture
def skewed(tmp_path):
    return write_skewed_trace(tmp_path / "t.trace")


def run(*words):
    return main(["trace", *map(str, words)])


def test_replay_command_prints_rows_and_plots(skewed, tmp_path, capsys):
    plot, heat_map = tmp_path / "a.svg", tmp_path / "b.png"
    words = ("replay", skewed, "--residency", "25,50,12.5", "--policy", "lru, belady,lru", "--json")
    assert run(*words, "--plot", plot, "--heat-map", heat_map) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["residency"], row["slots"]) for row in rows] == [
        ("lru", 25, 6), ("lru", 50, 12), ("lru", 12.5, 3), ("belady", 25, 6), ("belady", 50, 12), ("belady", 12.5, 3),
    ]  # fmt: skip
    assert plot.stat().st_size
    assert heat_map.stat().st_size
    run(*words[:-1])
    assert f"{rows[0]['hit_rate']:.4f}" in capsys.readouterr().out


def test_replay_options_reach_the_replay(skewed, capsys):
    hits = []
    for options in ([], ["--warm"], ["--per-layer"]):
        run("replay", skewed, "--policy", "lru", "--residency", 50, "--json", *options)
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
def test_bad_replay_options_are_named(skewed, capsys, options, words):
    assert run("replay", skewed, *options) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--max-tokens", 0), ("--expert-mb", -1), ("--expert-mb", "nan")])
def test_bad_report_options_are_named(skewed, tmp_path, capsys, option, value):
    assert run("report", skewed, "-o", tmp_path / "r.html", option, value) == 1
    assert option in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_report_shows_what_was_measured_and_prints_its_advice(skewed, tmp_path, capsys):
    out, measured = tmp_path / "r.html", tmp_path / "m.json"
    measured.write_text(json.dumps({"timeliness": 0.75}))
    assert run("report", skewed, "-o", out, "--realised", measured, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert told["advice"] in out.read_text()
    assert "75.0%" in out.read_text()
