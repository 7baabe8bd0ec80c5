"""`moeflow trace` as a user types it, and what conversion keeps of its sources."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.cli.prompts import read_prompts
from moeflow.errors import ConfigError, TraceError
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import DECODE, RoutingTrace

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
    assert told == {"trace": str(tmp_path / "t"), "prompts": 2, "tokens": len(trace)}
    first, second = trace.sequences()
    letters = "".join(chr(32 + token) for token in trace.token_ids[first])
    assert letters.startswith("u:hello a:")
    assert trace.phase[first].tolist() == [0] * 10 + [1] * 3
    assert len(trace.token_ids[second]) == 8 + 3


def test_record_appends_only_when_asked(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"turns": ["abc", "def"]}\n')
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t") == 0
    before = (tmp_path / "t").read_bytes()
    assert record(folder, tmp_path / "p.jsonl", tmp_path / "t") == 1
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


def test_a_killed_recording_leaves_what_is_written(folder, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n" * 10_000)
    command = [sys.executable, "-m", "moeflow", "trace", "record", str(folder), "--prompts", str(tmp_path / "p.txt")]
    run = subprocess.Popen(
        [*command, "-o", str(tmp_path / "t"), "--max-new-tokens", "2", "--expert-memory", "50%"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in run.stderr:
        if "recording" in line:
            break
    while not _has_rows(tmp_path / "t"):
        assert run.poll() is None
    run.kill()
    run.wait()
    run.stderr.close()
    trace = RoutingTrace.open(tmp_path / "t")
    assert {rows.stop - rows.start for rows in trace.sequences()} == {10 + 1}  # whole answers


def _has_rows(path):
    try:
        return len(RoutingTrace.open(path)) > 0
    except TraceError:
        return False


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


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "one\n\n two \n", ["one", "two"]),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n{"question": "c"}\n{"turns": ["d", "e"]}\n', list("abcd")),
    ],
)
def test_prompts_are_read_from_text_and_json_lines(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, limit=1) == expected[:1]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": 3}', '{"turns": []}', '{"text": " "}'])
def test_a_bad_prompt_is_named_by_its_line(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts(tmp_path / "p.jsonl")


def test_files_without_prompts_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, told in (("empty.txt", "no prompt"), ("binary.txt", "UTF-8"), ("absent.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            read_prompts(tmp_path / name)


def write_gpt_oss(folder, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "expert_ids": rng.integers(0, 32, (6, 3, 4)).astype(np.uint8),
        "weights": -np.sort(-rng.random((6, 3, 4)).astype(np.float16), axis=2),
        "token_index": np.arange(6, dtype=np.int32),
        "seq_start": np.array([0, 4]),
        "seq_len": np.array([4, 2]),
    } | changes
    folder.mkdir()
    np.savez(folder / "topk.npz", **{name: array for name, array in arrays.items() if array is not None})
    facts = {"dataset": "d", "category": "c", "prompt_tokens": 3, "finished": True, "repetition": False}
    (folder / "sequences.json").write_text(json.dumps([facts | {"duplicate": d, "n": 9} for d in (False, True)]))
    return arrays


def test_a_gpt_oss_folder_is_converted_whole(tmp_path):
    arrays = write_gpt_oss(tmp_path / "g")
    assert convert_trace(tmp_path / "g", tmp_path / "t") == 6
    trace = RoutingTrace.open(tmp_path / "t")
    np.testing.assert_array_equal(trace.experts, arrays["expert_ids"])
    np.testing.assert_array_equal(trace.weights, arrays["weights"])
    np.testing.assert_array_equal(trace.token_ids, arrays["token_index"])
    assert trace.sequences() == [slice(0, 4), slice(4, 6)]
    assert trace.fingerprint == "openai/gpt-oss-20b"
    assert [facts["duplicate"] for facts in trace.sequence_facts] == [False, True]
    assert set(trace.sequence_facts[0]) == {
        "dataset", "category", "prompt_tokens", "finished", "repetition", "duplicate",
    }  # fmt: skip


def test_the_real_gpt_oss_folder_is_converted_whole(data_folder, tmp_path):
    source = data_folder / "gpt_oss_20b"
    convert_trace(source, tmp_path / "t")
    trace = RoutingTrace.open(tmp_path / "t")
    with np.load(source / "gpt_oss_20b_topk.npz") as arrays:
        assert np.array_equal(trace.experts, arrays["expert_ids"])
        assert np.array_equal(trace.weights, arrays["weights"])
        assert np.array_equal(trace.token_ids, arrays["token_index"])
        ends = zip(arrays["seq_start"].tolist(), arrays["seq_len"].tolist(), strict=True)
    assert trace.sequences() == [slice(start, start + length) for start, length in ends]
    assert [facts["duplicate"] for facts in trace.sequence_facts] == [
        entry["duplicate"] for entry in json.loads((source / "sequences.json").read_text())
    ]


def test_the_real_olmoe_lines_are_converted_whole(data_folder, tmp_path, capsys):
    source = data_folder / "olmoe_trace" / "trace_olmoe_299.jsonl"
    assert main(["trace", "convert", str(source), "-o", str(tmp_path / "t"), "--fingerprint", "olmoe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 299
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.experts.tolist() == [json.loads(line)["layers"] for line in source.read_text().splitlines()]
    assert (trace.num_experts, trace.top_k, trace.fingerprint) == (64, 8, "olmoe")
    assert trace.weights is None
    assert not trace.format.ranked
    assert (trace.phase == DECODE).all()


def test_lines_begin_a_sequence_where_the_count_starts_again(tmp_path):
    lines = [(1, [[0, 1], [2, 3]]), (2, [[0], [1, 2]]), (1, [[1, 2], [3]])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tok": t, "layers": e}) + "\n" for t, e in lines))
    convert_trace(tmp_path / "a.jsonl", tmp_path / "t", num_experts=8)
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.sequence.tolist() == [0, 0, 1]
    assert trace.experts[1].tolist() == [[0, 255], [1, 2]]
    assert (trace.num_experts, trace.fingerprint) == (8, "a")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        '{"tok": 2}',
        '{"tok": "a", "layers": [[1, 2]]}',
        '{"tok": 2, "layers": [[1, 2], [3, 4]]}',
        '{"tok": 2, "layers": [[]]}',
        '{"tok": 2, "layers": [[1, -2]]}',
        '{"tok": 2, "layers": [[1, 1]]}',
        '{"tok": 2, "layers": [[1, true]]}',
        '{"tok": 2, "layers": [[1, 70000]]}',
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"tok": 1, "layers": [[1, 2]]}\n' + line + "\n")
    with pytest.raises(TraceError, match="line 2"):
        convert_trace(tmp_path / "a.jsonl", tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": None},
        {"weights": np.zeros((5, 3, 4), np.float16)},
        {"expert_ids": np.full((6, 3, 4), 40, np.uint8)},
        {"expert_ids": np.zeros(6, np.uint8)},
        {"seq_len": np.array([4, 3])},
        {"seq_start": np.array([0]), "seq_len": np.array([6])},
    ],
)
def test_a_damaged_gpt_oss_folder_is_refused(tmp_path, changes):
    write_gpt_oss(tmp_path / "g", **changes)
    with pytest.raises(TraceError, match="g"):
        convert_trace(tmp_path / "g", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_missing_sources_and_existing_traces_are_refused(tmp_path):
    with pytest.raises(TraceError, match="not there"):
        convert_trace(tmp_path / "absent", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"0 \.npz"):
        convert_trace(tmp_path / "empty", tmp_path / "t")
    (tmp_path / "t").write_text("mine")
    with pytest.raises(TraceError, match="exists"):
        convert_trace(tmp_path / "empty", tmp_path / "t")
    assert (tmp_path / "t").read_text() == "mine"
