"""Count files: each form is read as it was meant, and every bad one is refused with what is accepted."""

import json

import numpy as np
import pytest

from moeflow.errors import PlacementError
from moeflow.placement.files.counts import read_counts

LOAD = [[1, 2, 3], [4, 5, 6]]


def write(folder, content, name="counts.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


@pytest.mark.parametrize("key", ["logical_count", "expert_popularity", "load"])
def test_dense_layers_before_all_others_are_left_out(tmp_path, key):
    workload = read_counts(write(tmp_path, {key: [[0, 0, 0], [0.0, 0, 0], *LOAD]}))
    assert workload.load.tolist() == LOAD
    assert (workload.first_layer, workload.name, workload.transitions) == (2, "counts", None)


@pytest.mark.parametrize("key", ["logical_count", "expert_popularity"])
def test_keys_of_the_other_program_are_no_matter(tmp_path, key):
    assert read_counts(write(tmp_path, {"total_input_tokens": 3, key: LOAD, "rank": 0})).load.tolist() == LOAD


@pytest.mark.parametrize("kind", ["json", "npz"])
def test_our_own_form_keeps_all_that_it_says(tmp_path, kind):
    transitions, coactivation = np.ones((1, 3, 3)), np.ones((2, 3, 3)) - np.eye(3)
    content = {
        "load": np.array(LOAD),
        "transitions": transitions,
        "coactivation": coactivation,
        "top_k": 2,
        "first_layer": 3,
    }
    if kind == "npz":
        np.savez(tmp_path / "a.npz", **content)
    else:
        listed = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in content.items()}
        write(tmp_path, listed, "a.json")
    workload = read_counts(tmp_path / f"a.{kind}")
    assert workload.load.tolist() == LOAD
    np.testing.assert_array_equal(workload.transitions, transitions)
    np.testing.assert_array_equal(workload.coactivation, coactivation)
    assert (workload.top_k, workload.first_layer) == (2, 3)


def test_a_bare_array_is_the_load(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 0, 0], *LOAD], np.uint32))
    workload = read_counts(tmp_path / "a.npy")
    assert (workload.load.tolist(), workload.first_layer) == (LOAD, 1)


STEPS = [[[0, 0, 0], [1, 0, 3], [4, 5, 0]], [[0, 0, 0], [0, 2, 0], [0, 0, 6]]]  # [steps, layers, experts] of LOAD


def test_steps_of_sglang_are_summed_as_its_balancer_does(tmp_path):
    workload = read_counts(write(tmp_path, {"logical_count": STEPS}))
    assert (workload.load.tolist(), workload.first_layer) == (LOAD, 1)
    with pytest.raises(PlacementError, match="logical_count has a count that is negative"):
        read_counts(write(tmp_path, {"logical_count": [[[5, 1]], [[-1, 1]]]}))


@pytest.mark.torch
def test_what_torch_saved_is_read_and_nothing_else_is_unpickled(tmp_path):
    import torch

    counts, path = torch.tensor(STEPS, dtype=torch.int32), tmp_path / "a.pt"
    for content in ({"rank": 0, "logical_count": counts}, {"load": counts.sum(0)[1:]}, counts.sum(0).bfloat16()):
        torch.save(content, path)
        assert read_counts(path).load.tolist() == LOAD
    for content, told in (
        ({"records": []}, "mode stat"),
        ([1], "holds a list"),
        ({"logical_count": "x"}, "not an array of numbers"),
        ({"logical_count": object()}, "more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(PlacementError, match=told):
            read_counts(path)
    path.write_bytes(b"\x80\x02junk")
    with pytest.raises(PlacementError, match="is damaged"):
        read_counts(path)


TABLE = "0,0,0\n1,2,3\n\n4, 5,6.0\n"
SGLANG_CSV = "layer_id,expert_id,count\n1,0,1\n1,1,2\n1,2,3\n2,0,4\n2,1,2\n2,1,3\n2,2,6\n"


@pytest.mark.parametrize(
    "text", [SGLANG_CSV, "\ufeff" + SGLANG_CSV.replace("\n", "\r\n"), "0,0,0\n1,2,3\n\n4, 5,6.0\n"]
)
def test_separated_values_are_sglangs_lines_or_a_table(tmp_path, text):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    workload = read_counts(tmp_path / "a.csv")
    assert (workload.load.tolist(), workload.first_layer) == (LOAD, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "could not convert string to float: 'a'"),
        ("1,2\n3\n", "rows of unequal lengths"),
        ("layer_id,expert_id,count\n", "no rows"),
        ("layer_id,expert_id,count\n1,2\n", "rows of unequal lengths"),
        ("layer_id,expert_id,count\n0,1e9,5\n", "no whole number from 0 to 4095"),
        ("layer_id,expert_id,count\n0,0.5,5\n", "no whole number from 0 to 4095"),
        ("1,nan\n", "Counts are finite"),
    ],
)
def test_bad_separated_values_are_refused(tmp_path, text, told):
    with pytest.raises(PlacementError, match=told):
        read_counts(write(tmp_path, text, "a.csv"))


def test_the_real_deepseek_and_mixtral_files_are_read(data_folder):
    deepseek = read_counts(data_folder / "deepseek_v3_load" / "prefill_in512.json")
    assert (deepseek.shape, deepseek.first_layer) == ((58, 256), 3)
    mixtral = read_counts(data_folder / "mixtral_popularity" / "base_machine_learning.json")
    assert (mixtral.shape, mixtral.first_layer) == ((32, 8), 0)
    assert mixtral.load[0, 0] == 1302


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("{", "not JSON"),
        ("\x00\xff", "not JSON"),
        ([LOAD], "a JSON list, not an object"),
        ({}, "has no keys"),
        ({"counts": LOAD, "model": 1}, "keys 'counts', 'model'"),
        ({"load": LOAD, "transition": 1}, "unknown key 'transition'"),
        ({"load": [[1, 2], [3]]}, "ragged"),
        ({"load": [["1", "2"]]}, "not an array of numbers"),
        ({"load": [[True, False]]}, "not an array of numbers"),
        ({"load": 3}, "not an array of numbers"),
        ({"load": None}, "not an array of numbers"),
        ({"load": [1, 2]}, r"shape \[2\]"),
        ({"load": [[[1]]]}, r"shape \[1, 1, 1\]"),
        ({"load": []}, r"shape \[0\]"),
        ({"load": [[]]}, r"shape \[1, 0\]"),
        ({"load": [[0, 0], [0, 0]]}, "no load"),
        ({"load": [[1, 2], [0, 0]]}, "no load, the first is row 1"),
        ({"load": [[1, -2]]}, r"\[0, 1\] is -2"),
        ({"logical_count": [[1, -1], [1, 2]]}, r"\[0, 1\] is -1"),
        ('{"load": [[1, NaN]]}', "is nan"),
        ('{"expert_popularity": [[Infinity, 1]]}', "is inf"),
        ({"load": LOAD, "transitions": LOAD}, r"transitions has shape \[2, 3\], and \[1, 3, 3\]"),
        ({"load": LOAD, "coactivation": [LOAD]}, r"coactivation has shape .* and \[2, 3, 3\]"),
        ({"load": LOAD, "top_k": 4}, "top_k is 4"),
        ({"load": LOAD, "top_k": 0}, "top_k is 0"),
        ({"load": LOAD, "top_k": 1.5}, "top_k is 1.5"),
        ({"load": LOAD, "top_k": True}, "top_k is True"),
        ({"load": LOAD, "first_layer": -1}, "first_layer is -1"),
    ],
)
def test_a_bad_count_file_is_refused(tmp_path, content, told):
    with pytest.raises(PlacementError, match=told):
        read_counts(write(tmp_path, content))


def test_json_that_is_nested_deeply_is_refused_and_a_byte_order_mark_is_read(tmp_path):
    with pytest.raises(PlacementError, match="is not JSON"):
        read_counts(write(tmp_path, "[" * 100_000))
    (tmp_path / "a.json").write_text(json.dumps({"load": LOAD}), encoding="utf-8-sig")
    assert read_counts(tmp_path / "a.json").load.tolist() == LOAD


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04junk")
    (tmp_path / "junk.npy").write_bytes(b"junk")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "folder.json").mkdir()
    for name, told in (
        ("junk.npz", "cannot be read as arrays"),
        ("junk.npy", "cannot be read as arrays"),
        ("objects.npy", "cannot be read as arrays"),
        ("other.npz", "keys 'a'"),
        ("absent.json", "cannot be read: No such file"),
        ("folder.json", "cannot be read"),
        ("counts.txt", "Accepted are"),
        ("counts", "Accepted are"),
    ):
        with pytest.raises(PlacementError, match=told):
            read_counts(tmp_path / name)


def test_a_truncated_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", load=np.ones((20, 30)))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PlacementError, match="cannot be read as arrays"):
        read_counts(tmp_path / "a.npz")
