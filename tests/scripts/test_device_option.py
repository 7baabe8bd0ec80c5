"""Benchmarks run on the device that they are told."""

import json

import pytest

import bench_live
import bench_prefill
import bench_resident
import check_greedy
import hash_logits
from helpers.cpu_experts import needs_library
from moeflow.errors import ConfigError


@pytest.mark.slow
@needs_library
def test_decoding_and_prompts_are_measured_on_the_cpu_by_default(speaking_folder, capsys):
    options = ["--model", str(speaking_folder), "--dtype", "float32", "--rounds", "1", "--threads", "1"]
    assert bench_resident.main([*options, "--tokens", "4"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["device"] == "cpu"
    assert set(found["rows"]) == {"transformers eager", "moeflow", "moeflow native step"}
    assert bench_prefill.main([*options, "--prompts", "8", "--expert-memory", "50%"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["engine"] for row in found["rows"]} == {"transformers eager", "moeflow 50%"}
    assert 0 < sum(found["rows"][1]["shares"].values()) < 2


@pytest.mark.parametrize("script", [bench_resident, bench_prefill, check_greedy, hash_logits])
def test_a_card_that_is_not_there_is_refused(script, speaking_folder):
    folder = ["--no-demo"] if script is hash_logits else ["--model", str(speaking_folder)]
    with pytest.raises((ConfigError, AssertionError, RuntimeError), match="CUDA"):
        script.main([*folder, "--device", "cuda:0"])


def test_a_process_of_the_live_comparison_takes_the_device_of_its_job(speaking_folder):
    job = {
        "model": str(speaking_folder),
        "sides": [(None, "python")],
        "budget": "50%",
        "threads": 1,
        "device": "cuda:0",
    }
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        bench_live.work(job)
