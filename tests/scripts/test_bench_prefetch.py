"""The prefetch benchmark prints its rows and writes what a report takes."""

import json

import pytest

import bench_prefetch
from helpers.link_traces import write_random_trace
from moeflow.replay.measured import read_realised


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    return write_random_trace(tmp_path_factory.mktemp("machine") / "t")


def test_bench_prefetch_prints_rows_and_writes_what_a_report_takes(trace_file, tmp_path, capsys):
    out = tmp_path / "realised.json"
    options = ["--trace", str(trace_file), "--predictor", "markov", "--residency", "25,50", "--realised-out", str(out)]
    bench_prefetch.main(options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["policy"], row["residency"]): row for row in result["rows"]}
    assert set(rows) == {(policy, residency) for policy in bench_prefetch.POLICIES for residency in (25.0, 50.0)}
    assert all(0 < row["share"] <= 1 for row in rows.values())
    realised = read_realised(out)
    assert {row["policy"] for row in realised.rows} == {"forecast", "clairvoyant"}
    assert set(realised.wasted_bytes) == {"forecast", "clairvoyant"}
    assert "0" in realised.recall_by_distance["markov"]
