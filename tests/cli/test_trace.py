"""`moeflow trace` as a user types it: record, append, look."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.trace.trace import RoutingTrace

FEW_TOKENS = ("--max-new-tokens", "4", "--expert-memory", "50%")


@pytest.fixture(scope="module")
def folder(mixtral_folder, tmp_path_factory):
    """The tiny checkpoint with a tokenizer of letters and a chat template."""
    folder = shutil.copytree(mixtral_folder, tmp_path_factory.mktemp("trace_cli") / "model")
    letters = {chr(code): number for number, code in enumerate(range(32, 127))}
    words = Tokenizer(models.BPE(letters, [], unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "u:{{ messages[0]['content'] }} a:"
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(folder)
    return folder


def record(folder, prompts, out, *options):
    return main(["trace", "record", str(folder), "--prompts", str(prompts), "-o", str(out), *FEW_TOKENS, *options])


def test_record_writes_a_sequence_a_prompt_in_the_chat_template(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hello\n\nabc\nnever read\n")
    assert record(folder, tmp_path / "p.txt", tmp_path / "t", "--limit", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    trace = RoutingTrace.open(tmp_path / "t")
    assert told == {"trace": str(tmp_path / "t"), "prompts": 2, "prompts_before": 0, "tokens": len(trace)}
    first, second = trace.sequences()
    letters = "".join(chr(32 + token) for token in trace.token_ids[first])
    assert letters.startswith("u:hello a:")
    assert trace.phase[first].tolist() == [0] * 10 + [1] * 3
    assert len(trace.token_ids[second]) == 8 + 3


def test_record_reads_messages_and_a_byte_order_mark(folder, tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    lines = '\ufeff{"messages": ' + json.dumps(messages) + '}\n{"prompt": "abc"}\n'
    (tmp_path / "p.JSONL").write_text(lines, encoding="utf-8")
    assert record(folder, tmp_path / "p.JSONL", tmp_path / "t") == 0
    trace = RoutingTrace.open(tmp_path / "t")
    said = ["".join(chr(32 + token) for token in trace.token_ids[rows]) for rows in trace.sequences()]
    assert [letters.partition(" a:")[0] for letters in said] == ["u:hello", "u:abc"]


def test_a_prompt_that_the_template_refuses_is_named_before_anything_is_recorded(folder, tmp_path, capsys):
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n' + json.dumps({"messages": messages}) + "\n")
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t") == 1
    assert "prompt 2 of 2: the model's chat template leaves out message 2" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_name_that_the_terminal_has_no_letters_for_is_told_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "lines.jsonl").write_text('{"tok": 1, "layers": [[0, 1], [1, 2]]}\n')
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    assert main(["trace", "convert", str(tmp_path / "lines.jsonl"), "-o", str(tmp_path / "\u00e9")]) == 0
    sys.stdout.flush()
    assert b"wrote" in out.getvalue()
    assert b"\\xe9: 1 tokens" in out.getvalue()


def test_record_appends_only_when_asked(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"turns": ["abc", "def"]}\n')
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t") == 0
    before = (tmp_path / "t").read_bytes()
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t") == 0
    assert "has all of these prompts already; --append" in capsys.readouterr().err
    (tmp_path / "q.txt").write_text("other\n")
    for prompts, *options in (("q.txt",), ("p.jsonl", "--lookahead"), ("p.jsonl", "--dtype", "bfloat16")):
        assert record(folder, tmp_path / prompts, tmp_path / "t", *options) == 1
        assert "--append" in capsys.readouterr().err
    assert (tmp_path / "t").read_bytes() == before
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t", "--append") == 0
    assert RoutingTrace.open(tmp_path / "t").sequence_numbers.tolist() == [0, 1]


def test_lookahead_that_was_recorded_can_be_replayed(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hello\nabc\n")
    assert record(folder, tmp_path / "p.txt", tmp_path / "t", "--lookahead") == 0
    capsys.readouterr()
    assert main(["trace", "info", str(tmp_path / "t"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lookahead"] == [2, 4]
    machine = ["--link-gb-s", "1", "--expert-mb", "1", "--layer-ms", "1"]
    command = ["trace", "replay", str(tmp_path / "t"), "--residency", "50", "--policy", "lru"]
    assert main([*command, *machine, "--predictor", "lookahead", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row.get("predictor"), row["tokens"]) for row in rows] == [
        ("lru", None, 6),
        ("forecast", "lookahead", 6),
    ]
    assert rows[1]["prefetch"]["issued"] > 0


_RECORD = """
import os, resource, signal, sys
from moeflow.cli.main import main
from moeflow.trace.writer import TraceWriter
how, number, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
write = TraceWriter.write
def write_and_die(self, rows):
    write(self, rows)
    write_and_die.left -= len(rows) > 0
    if not write_and_die.left and len(rows):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGINT)
write_and_die.left = number
TraceWriter.write = write if how == "full" else write_and_die
sys.exit(main(command))
"""


def run_record(how, number, folder, prompts, out, *options):
    command = ["trace", "record", str(folder), "--prompts", str(prompts), "-o", str(out), *FEW_TOKENS, *options]
    return subprocess.run(
        [sys.executable, "-c", _RECORD, how, str(number), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("interrupt", 130)])
def test_an_interrupted_recording_goes_on_to_the_same_bytes(folder, tmp_path, capsys, how, code):
    """The second write is half of a prompt, of more rows than are held back: it is cut off and recorded again."""
    (tmp_path / "p.txt").write_text("hello\n" + "long " * 50 + "\nabc\n")
    assert record(folder, tmp_path / "p.txt", tmp_path / "whole") == 0
    run = run_record(how, 2, folder, tmp_path / "p.txt", tmp_path / "t")
    assert run.returncode == code, run.stderr
    assert len(RoutingTrace.open(tmp_path / "t").sequences()) == 2
    capsys.readouterr()
    assert record(folder, tmp_path / "p.txt", tmp_path / "t", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompts"], told["prompts_before"]) == (3, 1)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_an_interrupted_append_goes_on_and_keeps_what_was_before(folder, tmp_path):
    (tmp_path / "p.txt").write_text("hello\nabc\n")
    (tmp_path / "q.txt").write_text("def\nghi\njkl\n")
    for out in ("whole", "t"):
        assert record(folder, tmp_path / "p.txt", tmp_path / out) == 0
    assert record(folder, tmp_path / "q.txt", tmp_path / "whole", "--append") == 0
    assert run_record("kill", 2, folder, tmp_path / "q.txt", tmp_path / "t", "--append").returncode == -signal.SIGKILL
    assert record(folder, tmp_path / "q.txt", tmp_path / "t", "--append") == 0
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_a_full_disk_ends_a_recording_in_one_line_and_the_next_run_goes_on(folder, tmp_path):
    (tmp_path / "p.txt").write_text("hello\nabc\n")
    assert record(folder, tmp_path / "p.txt", tmp_path / "whole") == 0
    for number in (1000, 4096 + 500):
        run = run_record("full", number, folder, tmp_path / "p.txt", tmp_path / "t")
        assert run.returncode == 1
        assert "Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1].startswith(f"moeflow: {tmp_path / 't'} cannot be written: File too large")
        assert (tmp_path / "t").exists() == (number > 4096)
    assert record(folder, tmp_path / "p.txt", tmp_path / "t") == 0
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()


def test_info_tells_what_a_trace_holds(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hello\n")
    record(folder, tmp_path / "p.txt", tmp_path / "t")
    capsys.readouterr()
    assert main(["trace", "info", str(tmp_path / "t"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["num_layers"], about["num_experts"], about["top_k"]) == (3, [8, 8, 8], 2)
    assert (about["tokens"], about["prefill_tokens"], about["decode_tokens"], about["sequences"]) == (13, 10, 3, 1)
    assert main(["trace", "info", str(tmp_path / "t")]) == 0
    assert about["fingerprint"] in capsys.readouterr().out
    assert main(["trace", "info", str(tmp_path / "p.txt")]) == 1
    assert "not a routing trace" in capsys.readouterr().err
