"""The predictors' benchmark on a tiny trace: every predictor is trained, measured and timed."""

import json

import pytest

import bench_predictors as bench
from helpers.small_traces import make_trace
from moeflow.trace.writer import TraceWriter


@pytest.mark.slow
def test_bench_predictors_prints_a_row_for_every_predictor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_REPEATS", 1)
    monkeypatch.setattr(bench, "_STEPS", 2)
    made = make_trace(10)
    with TraceWriter(tmp_path / "t", made.format, sequence_facts=made.sequence_facts) as writer:
        writer.write(made._rows)
    bench.main(["--trace", str(tmp_path / "t"), "--epochs", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert set(told["figures"]) == {"popularity", "markov", "path", "sequence", "ensemble"}
    assert all(row["all_layers"]["recall@4"] > told["chance"]["recall@4"] for row in told["figures"].values())
    assert set(told["step_us"]) == {"gpt-oss-20b", "demo model"}
    assert [line for line in lines if line.startswith("target")]
