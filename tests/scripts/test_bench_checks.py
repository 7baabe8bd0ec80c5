"""The checks' share of a decode step is measured on the model's own calls, and the checks stay as they are."""

import json

import pytest

import bench_checks
from helpers.cpu_experts import needs_library
from moeflow.kernels.cpu import checks


@needs_library
@pytest.mark.slow
def test_the_share_of_a_step_is_the_sum_of_its_checks(speaking_folder, capsys):
    before = [getattr(checks, name) for name in bench_checks.CHECKS]
    options = ["--model", str(speaking_folder), "--dtype", "float32", "--tokens", "4", "--threads", "1"]
    assert bench_checks.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    calls = {row["check"]: row["calls_a_token"] for row in result["rows"]}
    assert calls["takes_linear"] > calls["takes_norm"] > calls["takes_layer"] > 0
    assert result["share"] == pytest.approx(
        sum(row["calls_a_token"] * row["seconds_a_call"] for row in result["rows"]) / result["step_s"]
    )
    assert before == [getattr(checks, name) for name in bench_checks.CHECKS]
