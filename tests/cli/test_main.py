"""The command line as a user types it: real processes, real pipes."""

import io
import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.kernels.cpu.library import instruction_set


def moeflow(*arguments, stdin=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moeflow", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(speaking_folder):
    return speaking_folder


def test_version_and_help_answer():
    assert moeflow("--version").stdout.startswith("moeflow 0.")
    for command in ("chat", "generate", "info", "pack", "demo-model"):
        run = moeflow(command, "--help")
        assert run.returncode == 0
        assert command in run.stdout


@pytest.mark.torch
def test_info_without_a_model_describes_the_installation():
    about = json.loads(moeflow("info", "--json").stdout)
    assert about["torch"]
    assert about["memory_available_bytes"] > 0
    assert "moeflow" in moeflow("info").stdout


def test_info_shows_which_gpus_the_process_may_use():
    about = json.loads(moeflow("info", "--json", CUDA_VISIBLE_DEVICES="").stdout)
    assert (about["gpus"], about["cuda_visible_devices"]) == ([], "")
    assert "cuda visible devices  '0,1'" in moeflow("info", CUDA_VISIBLE_DEVICES="0,1").stdout


@pytest.mark.slow
def test_info_tells_from_headers_what_each_budget_buys(folder):
    about = json.loads(moeflow("info", folder, "--json").stdout)
    assert (about["moe_layers"], about["num_experts"], about["num_experts_per_tok"]) == (3, 24, 2)
    assert about["expert_bytes"] == 3 * 64 * 96 * 4
    assert about["minimum_bytes"] == 3 * 73728
    assert [row["slots"] for row in about["budgets"]] == [3, 6, 12, 18, 24]
    text = moeflow("info", folder).stdout
    assert "smallest budget" in text
    assert "221,184 bytes" in text


@pytest.mark.slow
@pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
def test_info_prints_the_program_of_a_step_which_the_first_run_has_kept(folder):
    first, second = (json.loads(moeflow("info", folder, "--step", "--json").stdout) for _ in range(2))
    assert first["reason"] is None
    assert first["instructions"]["experts"] == first["instructions"]["attend"] == 3
    assert first["memory_bytes"] > 0
    assert second == {**first, "from_disk": True}
    text = moeflow("info", folder, "--step").stdout
    assert "beside the weights; from the disk" in text
    assert second["text"] in text
    assert "name the model" in moeflow("info", "--step").stderr


@pytest.mark.slow
def test_info_says_why_a_model_decodes_by_its_own_code(folder):
    said = moeflow("info", folder, "--step", MOEFLOW_CPU_KERNELS="off").stdout
    assert "decodes by its own code: the compiled kernels were not built" in said


@pytest.mark.slow
def test_generate_streams_an_answer_and_its_figures(folder):
    run = moeflow("generate", folder, "hello", "--max-new-tokens", 5, "--temperature", 0, "--expert-memory", "50%")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.rstrip("\n")) > 0
    assert "tok/s" in run.stderr
    piped = moeflow("generate", folder, "--json", "--max-new-tokens", 5, "--temperature", 0, stdin="hello\n")
    figures = json.loads(piped.stdout)
    assert figures["num_new_tokens"] == 5
    assert figures["moeflow"]["decode"].keys() >= {"predict_s", "waited_for_prefetch"}


@pytest.mark.slow
def test_predictor_none_is_demand_only(folder):
    options = ("hello", "--max-new-tokens", 5, "--json", "--temperature", 0, "--expert-memory", "50%")
    figures = [
        json.loads(moeflow("generate", folder, *options, "--predictor", name).stdout) for name in ("none", "auto")
    ]
    assert [answer["moeflow"]["prediction"] is None for answer in figures] == [True, False]
    assert figures[0]["text"] == figures[1]["text"]


@pytest.mark.slow
def test_piped_chat_answers_once_and_ends(folder):
    run = moeflow("chat", folder, "--max-new-tokens", 4, "--temperature", 0, stdin="who are you?\n")
    assert run.returncode == 0, run.stderr
    assert "hit rate" in run.stderr
    figures = moeflow("chat", folder, "--max-new-tokens", 4, "--json", stdin="hi")
    assert json.loads(figures.stdout)["num_new_tokens"] <= 4


@pytest.mark.slow
def test_pack_writes_a_folder_that_generate_takes(folder, tmp_path):
    run = moeflow("pack", folder, tmp_path / "packed", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["folder"] == str(tmp_path / "packed")
    options = ("hello", "--max-new-tokens", 5, "--temperature", 0)
    first, second = (moeflow("generate", each, *options) for each in (folder, tmp_path / "packed"))
    assert first.stdout == second.stdout


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("info", "no/such/folder"), "not a folder"),
        (("generate", "MODEL", "hi", "--expert-memory", "1KB"), "minimum is 221,184 bytes"),
        (("generate", "MODEL", "hi", "--policy", "best"), "lru, lfu, lfru, static"),
        (("generate", "MODEL", "hi", "--predictor", "crystal"), "crystal"),
        (("generate", "MODEL", "hi", "--miss", "cheapest", "--device", "cpu"), "runs on the CPU"),
        (("generate", "MODEL", "hi", "--miss", "guess"), "copy, cheapest"),
        (("generate", "MODEL", "hi", "--host-memory", "1GB", "--device", "cpu"), "expert_memory"),
        (("generate", "MODEL", " "), "prompt is empty"),
        (("pack", "MODEL", "MODEL"), "exists"),
        (("info", ""), "the model is ''"),
        (("chat", ""), "the model is ''"),
        (("generate", "MODEL", "a\udcff"), "which is no text"),
        (("chat", "MODEL", "--system", "a\udcff"), "which is no text"),
        (("generate", "MODEL", "hi", "--dtype", "fp8"), "float32, bfloat16, float16 or float64"),
        (("generate", "MODEL", "hi", "--temperature", "nan"), "temperature is nan"),
        (("generate", "MODEL", "hi", "--seed", str(2**70)), "2**63 - 1"),
        (("generate", "MODEL", "hi", "--seed", "-1"), "2**63 - 1"),
        (("chat", "MODEL", "--top-p", "2"), "at most 1"),
        (("chat", "MODEL", "--device", "xpu"), "not supported"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(folder, arguments, match, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi" if "--system" in arguments else ""))
    code = main([str(folder) if argument == "MODEL" else argument for argument in arguments])
    one_line(code, capfd.readouterr().err, match)


@pytest.mark.torch
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_piped_prompt_is_text(folder, command, capfd, monkeypatch):
    for piped in (b"\xff\xfe\n", b"", b"\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        code = main([command, str(folder), "--max-new-tokens", "2"])
        one_line(code, capfd.readouterr().err, "the prompt")
    answers = []
    for piped in (b"hi", b"\xef\xbb\xbfhi\r\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        assert main([command, str(folder), "--max-new-tokens", "2", "--temperature", "0"]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_an_error_is_one_line_of_a_whole_process_too(folder):
    run = moeflow("generate", folder, "hi", "--expert-memory", "1KB", stdin="")
    one_line(run.returncode, run.stderr, "minimum is 221,184 bytes")


def one_line(code, said, match):
    """Assert that a command ended with 1 and said why in one line."""
    assert code == 1
    assert said.startswith("moeflow: ")
    assert match in said
    assert len(said.strip().splitlines()) == 1


def test_unknown_command_is_refused_by_the_parser():
    assert moeflow("fly").returncode == 2
