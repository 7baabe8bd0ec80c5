"""What conversion keeps of its sources, and which sources it refuses."""

import json
import random

import numpy as np
import pytest

from helpers.damage import damaged
from moeflow.cli.main import main
from moeflow.errors import TraceError
from moeflow.trace.convert import convert_trace
from moeflow.trace.format import DECODE
from moeflow.trace.trace import RoutingTrace


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


@pytest.mark.slow
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
    text = "".join(json.dumps({"tok": t, "layers": e}) + "\n" for t, e in lines)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
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
        "[" * 100_000,
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


def test_descriptions_of_sequences_nested_deeply_are_refused(tmp_path):
    write_gpt_oss(tmp_path / "g")
    (tmp_path / "g" / "sequences.json").write_text("[" * 100_000)
    with pytest.raises(TraceError, match="cannot be read"):
        convert_trace(tmp_path / "g", tmp_path / "t")


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


def test_damaged_sources_are_refused_or_read_as_they_were(tmp_path):
    write_gpt_oss(tmp_path / "g")
    (tmp_path / "a.jsonl").write_text(
        '{"tok": 1, "layers": [[6, 8], [7, 16]]}\n{"tok": 2, "layers": [[1, 2], [3, 4]]}\n'
    )
    rng, told = random.Random(0), []
    for source, file in (("g", "g/topk.npz"), ("g", "g/sequences.json"), ("a.jsonl", "a.jsonl")):
        whole = (tmp_path / file).read_bytes()
        for _ in range(150):
            (tmp_path / file).write_bytes(damaged(whole, rng, min(100, len(whole))))
            try:
                convert_trace(tmp_path / source, tmp_path / "t")
            except TraceError as error:
                told.append(str(error))
            (tmp_path / "t").unlink(missing_ok=True)
        (tmp_path / file).write_bytes(whole)
    assert len(told) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "g"]


def test_lines_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tok": 1, "layers": [[6, 8], [7, 16]]}\n', encoding="utf-8-sig")
    assert convert_trace(tmp_path / "a.jsonl", tmp_path / "t") == 1
