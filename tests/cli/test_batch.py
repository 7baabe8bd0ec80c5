"""`moeflow batch` as a user runs it: answers, failures by line, interrupted and killed runs that are continued."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from helpers.batch_command import batch, by_id, write
from helpers.paths import ROOT
from moeflow.cli.main import main

NUM_LONG = 12


@pytest.fixture(scope="module")
def folder(speaking_folder):
    return speaking_folder


@pytest.fixture(scope="module")
def long_input(tmp_path_factory):
    """Requests enough for a run that can be stopped in its middle."""
    entries = [{"id": f"r{number}", "prompt": f"prompt {number}"} for number in range(NUM_LONG)]
    return write(tmp_path_factory.mktemp("input") / "long.jsonl", entries)


@pytest.fixture(scope="module")
def long_answers(folder, long_input, tmp_path_factory):
    """What a run that nobody stops answers."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(long_run(folder, long_input, out)) == 0
    return by_id(out)


def long_run(folder, source, out):
    return batch(folder, source, out, "--batch-size", 2, "--max-new-tokens", 30, "--ignore-eos")


def stop_in_the_middle(arguments, out, signal_number):
    """Start a run, send it a signal when the first answer is there; returns exit code, output and last progress."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moeflow", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        while f" 0 of {NUM_LONG} done" not in process.stderr.readline():
            assert process.poll() is None, "it ended before its first step"
        while not out.stat().st_size and process.poll() is None:
            pass
        process.send_signal(signal_number)
        rest, output = process.stderr.read(), process.stdout.read()
    return process.returncode, output, rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["killed", "Ctrl-C"]
)
def test_a_run_stopped_in_the_middle_goes_on_from_there(
    folder, long_input, long_answers, tmp_path, capsys, signal_number, code
):
    out = tmp_path / "out.jsonl"
    arguments = [*long_run(folder, long_input, out), "--json"]
    returncode, output, rest = stop_in_the_middle(arguments, out, signal_number)
    assert returncode == code
    assert "Traceback" not in rest
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < NUM_LONG
    if signal_number == signal.SIGINT:
        about = json.loads(output)
        assert about["interrupted"]
        assert about["finished"] == before.count(b"\n")
        assert about["new_tokens"] > 0
        assert "the same command goes on from there" in rest.splitlines()[-1]
    capsys.readouterr()
    assert main(long_run(folder, long_input, out)) == 0
    num_before = before.count(b"\n")
    told = f"{out} has {num_before} of {NUM_LONG} requests already; {NUM_LONG - num_before} are left."
    assert capsys.readouterr().err.startswith(told)
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1]), "what was finished stays as it was"
    assert by_id(out) == long_answers


@pytest.mark.slow
def test_answers_are_those_of_generate(folder, long_answers, mixtral):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number in (0, 7):
        inputs = tokenizer(f"prompt {number}", return_tensors="pt")
        ids = mixtral.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert long_answers[f"r{number}"]["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_a_finished_batch_loads_no_model(folder, tmp_path, long_input, long_answers, capsys):
    out = write(tmp_path / "out.jsonl", list(long_answers.values()))
    capsys.readouterr()
    nowhere = tmp_path / folder.name
    assert main([*long_run(nowhere, long_input, out), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["requests"], about["finished_before"], about["failed"]) == (NUM_LONG, NUM_LONG, [])


def test_failed_lines_are_told_by_number_and_the_others_are_answered(folder, tmp_path, capsys):
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True}
    source = write(
        tmp_path / "in.jsonl",
        [
            {"id": "own", "prompt": "hello", "max_new_tokens": 4},
            "{torn",
            {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
            {"id": "own", "prompt": "again"},
            {"id": "long", "prompt": "x" * 1000},
            {"id": "hot", "prompt": "x", "temperature": 1.5, "seed": 1, "logprobs": 1},
            {"custom_id": "none", "method": "POST", "url": "/v1/chat/completions", "body": {**chat, "max_tokens": 0}},
        ],
    )
    out = tmp_path / "out.jsonl"
    assert main(batch(folder, source, out, "--max-new-tokens", 4, "--ignore-eos", "--json")) == 1
    captured = capsys.readouterr()
    about = json.loads(captured.out)
    assert [entry["line"] for entry in about["failed"]] == [2, 4, 5, 7]
    assert about["failed"][3]["error"] == "max_new_tokens is 0; it must be at least 1"
    assert "4 of 7 requests" in captured.err
    assert "line 5: the prompt has 1,000 tokens" in captured.err
    assert about["new_tokens"] == 4 + 3 + 4
    assert about["tokens_per_s"] > 0
    assert 0 <= about["hit_rate"] <= 1
    assert 0 < about["experts_per_step"] <= 24
    lines = by_id(out)
    assert set(lines) == {"own", "#2", "chat", "#4", "long", "hot", "none"}
    assert lines["own"]["completion_tokens"] == 4
    assert len(lines["hot"]["logprobs"]) == 4
    assert lines["chat"]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert len(lines["chat"]["response"]["body"]["choices"][0]["logprobs"]["content"]) == 3
    source.write_text(source.read_text().replace("x" * 1000, "short"))
    assert main(batch(folder, source, out, "--max-new-tokens", 4, "--ignore-eos")) == 1
    assert "error" in by_id(out)["long"], "a failed line is not tried again"
    assert main(batch(folder, source, out, "--max-new-tokens", 4, "--ignore-eos", "--retry-failed")) == 1
    assert by_id(out)["long"]["text"]
    assert by_id(out)["own"] == lines["own"]


@pytest.mark.slow
def test_a_stop_string_and_a_seed_hold_for_lines_that_leave_them_open(folder, tmp_path):
    entries = [{"prompt": "hello"}, {"prompt": "hello"}, {"prompt": "hello", "stop": []}]
    source = write(tmp_path / "in.jsonl", entries)
    options = ("--max-new-tokens", 20, "--temperature", 2, "--ignore-eos", "--seed", 5)
    answers = []
    for number in range(2):
        assert main(batch(folder, source, tmp_path / f"{number}.jsonl", *options)) == 0
        answers.append(by_id(tmp_path / f"{number}.jsonl"))
    assert answers[0] == answers[1]
    assert answers[0]["#1"]["text"] != answers[0]["#2"]["text"]
    stop = answers[0]["#1"]["text"][5]
    assert main(batch(folder, source, tmp_path / "stop.jsonl", *options, "--stop", stop)) == 0
    stopped = by_id(tmp_path / "stop.jsonl")
    assert stopped["#1"]["text"] == answers[0]["#1"]["text"].split(stop)[0]
    assert stopped["#1"]["finish_reason"] == "stop"
    assert stopped["#3"] == answers[0]["#3"]


def test_an_engine_with_a_disk_answers_and_keeps_its_folder(folder, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "hello"}]), tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 2, "--kept-folder", tmp_path / "kept", "--kept-disk", "1MiB")
    assert main(batch(folder, source, out, *options)) == 0
    assert by_id(out)["a"]["completion_tokens"] == 2
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--batch-size", 0), "--batch-size is 0"),
        (("--max-step-tokens", -1), "--max-step-tokens is -1"),
        (("--max-step-tokens", 8), "at least --batch-size, 32"),
        (("--group-size", 0), "--group-size is 0"),
        (("--temperature", -1), "temperature is -1"),
        (("--stop", ""), "none of them empty"),
        (("--input", "missing.jsonl"), "missing.jsonl cannot be read"),
        (("--output", "no/such/folder/out.jsonl"), "cannot be written"),
        (("--output", "INPUT"), "is the input too"),
        (("--kv-memory", "nothing"), "--kv-memory"),
        (("--kept-disk", "much"), "--kept-disk"),
        (("--expert-memory", "auto", "--kv-memory", "900TiB"), "are kept for activations and the key-value cache"),
    ],
)
def test_an_option_that_cannot_be_is_one_line_and_exit_code_1(folder, tmp_path, capsys, options, match):
    source = write(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    options = [source if option == "INPUT" else option for option in options]
    assert main(batch(folder, source, tmp_path / "out.jsonl", *options)) == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("moeflow: ")
    assert len(error.strip().splitlines()) == 1
    assert source.read_text() == '{"prompt": "hello"}\n'


def test_an_output_of_other_requests_stops_the_run_unless_it_is_to_be_kept_or_redone(folder, tmp_path, capsys):
    entries = [{"id": "a", "prompt": "hello"}, {"id": "b", "prompt": "world"}, {"id": "c", "prompt": ""}]
    source, out = write(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 4, "--ignore-eos")
    assert main(batch(folder, source, out, *options)) == 1
    before, answers = out.read_bytes(), by_id(out)
    write(source, [{"id": "a", "prompt": "hello"}, {"id": "b", "prompt": "word"}, {"id": "c", "prompt": "now"}])
    capsys.readouterr()
    assert main(batch(folder, source, out, *options)) == 1
    error = capsys.readouterr().err
    assert "for 1 of 3 requests; the first is line 2, id 'b'" in error
    assert len(error.splitlines()) == 1
    assert main(batch(folder, source, out, "--max-new-tokens", 5, "--ignore-eos")) == 1
    assert "for 2 of 3 requests" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "other")
    assert main(batch(tmp_path / "other", source, out, *options)) == 1
    assert "for 2 of 3 requests" in capsys.readouterr().err
    assert main(batch(folder, source, out, *options, "--changed", "keep")) == 1
    assert out.read_bytes() == before
    assert main(batch(folder, source, out, *options, "--changed", "redo", "--retry-failed")) == 0
    redone = by_id(out)
    assert redone["a"] == answers["a"]
    assert redone["b"]["request"] != answers["b"]["request"]
    assert redone["c"]["text"]
    assert main(batch(folder, source, out, *options)) == 0


def test_experts_a_step_are_those_of_all_its_passes(folder, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"prompt": text} for text in ("first", "second", "third")])
    found = {}
    for size in (1, 3):
        options = ("--max-new-tokens", 8, "--ignore-eos", "--group-size", size, "--json")
        assert main(batch(folder, source, tmp_path / f"{size}.jsonl", *options)) == 0
        found[size] = json.loads(capsys.readouterr().out)
    assert by_id(tmp_path / "1.jsonl") == by_id(tmp_path / "3.jsonl")
    assert found[1]["engine"]["steps"] == found[3]["engine"]["steps"] == 8
    for about in found.values():
        phases = [about["moeflow"][name] for name in ("prefill", "decode")]
        demanded = sum(phase["hits"] + phase["misses"] for phase in phases)
        assert about["experts_per_step"] * about["engine"]["steps"] == pytest.approx(demanded)
    assert found[1]["experts_per_step"] > found[3]["experts_per_step"]
