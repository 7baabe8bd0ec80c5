"""Workloads: what is counted of a trace, which sequences are held out, and that conversion leaves nothing behind."""

import json
import tempfile

import numpy as np
import pytest

from moeflow.errors import PlacementError, TraceError
from moeflow.trace.convert import convert_trace
from moeflow.trace.format import TraceFormat
from moeflow.trace.workloads import read_workload, split_workload
from moeflow.trace.writer import TraceWriter


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder of its own for temporary files, to see what stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def write_trace(path, sequences, *, experts_per_layer=(5, 5, 5), duplicates=(), **options):
    """Write a trace of two experts a token; returns each sequence's routes."""
    format = TraceFormat(experts_per_layer, 2, "model", has_weights=False)
    facts = [{"duplicate": number in duplicates} for number in range(len(sequences))] if duplicates else ()
    rng = np.random.default_rng(0)
    routes = []
    with TraceWriter(path, format, sequence_facts=facts, **options) as writer:
        for number, length in enumerate(sequences):
            rows = writer.new_rows(length)
            chosen = rng.random((length, len(experts_per_layer), min(experts_per_layer))).argsort(axis=2)[..., :2]
            rows["experts"], rows["sequence"], rows["phase"] = chosen, number, 1
            writer.write(rows)
            routes.append(chosen)
    return routes


def load_of(routes, num_experts=5):
    experts = np.concatenate(routes)
    return np.stack([np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in range(3)])


def test_a_trace_counts_every_token_but_duplicates(tmp_path):
    routes = write_trace(tmp_path / "a.trace", [30, 20, 10], duplicates={1})
    workload = read_workload(tmp_path / "a.trace")
    np.testing.assert_array_equal(workload.load, load_of([routes[0], routes[2]]))
    assert (workload.name, workload.top_k, workload.first_layer) == ("a", 2, 0)
    assert workload.transitions.sum() == 2 * 40 * 4
    experts = np.concatenate([routes[0], routes[2]])
    pairs = [(i, j) for token in experts for i in token[0] for j in token[1]]
    assert workload.transitions[0, 3, 1] == pairs.count((3, 1))
    assert workload.coactivation[2, 4, 0] == sum({4, 0} <= set(token[2]) for token in experts.tolist())


def test_every_nth_sequence_that_is_no_duplicate_is_held_out(tmp_path):
    routes = write_trace(tmp_path / "a", [11, 12, 13, 14, 15, 16, 17], duplicates={1})
    seen, held_out = split_workload(tmp_path / "a", 3)
    # Kept: 0, 2, 3, 4, 5, 6. The third and the sixth of them are 3 and 6.
    np.testing.assert_array_equal(held_out.load, load_of([routes[3], routes[6]]))
    np.testing.assert_array_equal(seen.load, load_of([routes[0], routes[2], routes[4], routes[5]]))
    assert (seen.name, held_out.name) == ("a", "a, held out")


def test_sequences_without_facts_are_no_duplicates(tmp_path):
    write_trace(tmp_path / "a", [5, 5])
    assert read_workload(tmp_path / "a").load.sum() == 10 * 3 * 2


def test_a_count_file_is_read_as_one(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": [[0, 0], [1, 2]]}))
    workload = read_workload(tmp_path / "a.json")
    assert (workload.load.tolist(), workload.first_layer) == ([[1, 2]], 1)


def test_json_lines_are_converted_and_nothing_is_left(tmp_path, temporary):
    (tmp_path / "a.jsonl").write_text('{"tok": 1, "layers": [[0, 1], [1, 2]]}\n{"tok": 2, "layers": [[0, 2], [1]]}\n')
    workload = read_workload(tmp_path / "a.jsonl")
    assert workload.load.tolist() == [[2, 1, 1], [0, 2, 1]]
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_the_real_gpt_oss_folder_is_counted_as_its_trace_is_and_nothing_is_left(data_folder, tmp_path, temporary):
    source = data_folder / "gpt_oss_20b"
    seen, held_out = split_workload(source, 5)
    assert not list(temporary.iterdir())
    convert_trace(source, tmp_path / "gpt.trace")
    whole = read_workload(tmp_path / "gpt.trace")
    assert whole.shape == (24, 32)
    np.testing.assert_array_equal(seen.load + held_out.load, whole.load)
    np.testing.assert_array_equal(seen.transitions + held_out.transitions, whole.transitions)
    with np.load(source / "gpt_oss_20b_topk.npz") as arrays:
        facts = json.loads((source / "sequences.json").read_text())
        kept = [number for number, entry in enumerate(facts) if not entry["duplicate"]]
        assert held_out.load[0].sum() == 4 * arrays["seq_len"][kept[4::5]].sum()


def test_a_damaged_folder_leaves_nothing_either(tmp_path, temporary):
    (tmp_path / "g").mkdir()
    with pytest.raises(TraceError, match=r"0 \.npz"):
        read_workload(tmp_path / "g")
    assert not list(temporary.iterdir())


def test_what_is_no_workload_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello hello hello")
    (tmp_path / "empty").touch()
    write_trace(tmp_path / "unequal", [5], experts_per_layer=(5, 4))
    write_trace(tmp_path / "copies", [5, 5], duplicates={0, 1})
    for name, error, told in (
        ("absent", PlacementError, "is not there. Give a trace, a folder"),
        ("absent.json", PlacementError, "cannot be read"),
        ("text", TraceError, "not a routing trace"),
        ("empty", TraceError, "is empty"),
        ("unequal", PlacementError, "4 to 5 experts"),
        ("copies", PlacementError, "all 2 sequences are marked as duplicates"),
    ):
        with pytest.raises(error, match=told):
            read_workload(tmp_path / name)


def test_what_cannot_be_split_is_refused(tmp_path):
    write_trace(tmp_path / "a", [5, 5])
    (tmp_path / "a.json").write_text(json.dumps({"load": [[1, 2]]}))
    for name, every, told in (
        ("a", 1, "Give 2 or more"),
        ("a", 3, "2 sequences that are no duplicates"),
        ("a.json", 2, "counts, which cannot be split"),
        ("absent", 2, "is not there"),
    ):
        with pytest.raises(PlacementError, match=told):
            split_workload(tmp_path / name, every)
