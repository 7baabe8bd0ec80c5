"""The index of a sharded checkpoint: hostile ones are refused, sub-folders are taken as transformers does."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.weight_index import read_weight_index
from moeflow.errors import CheckpointError


def write(folder, weight_map, metadata=None):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))
    return file


@pytest.mark.parametrize(
    ("name", "match"),
    [
        *[(odd, "where the name of a file should be") for odd in (None, 1, 1.5, True, [], {})],
        ("", "only safetensors files"),
        ("weights.bin", "only safetensors files"),
        ("x" * 5000 + ".safetensors", r"too long.*|letters\)"),
        ("a\0.safetensors", "which no file can be called"),
        ("\ud800.safetensors", "which no file can be called"),
        ("sub/../../x.safetensors", "outside the folder"),
        ("d/" * 3000 + "x.safetensors", "cannot be read|missing"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_odd_names_of_shards_are_refused_in_a_short_line(name, match, tmp_path):
    write(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": "b"}}',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_no_index_is_refused_by_name(text, tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index"):
        read_weight_index(file)


def test_an_index_of_no_tensor_or_of_too_many_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="names no tensor"):
        read_weight_index(write(tmp_path, {}))
    with pytest.raises(CheckpointError, match=r"names 10,001 files, at most 10,000"):
        read_weight_index(write(tmp_path, {f"a{n}": f"{n}.safetensors" for n in range(10_001)}))


def test_shards_may_lie_in_sub_folders(tmp_path):
    (tmp_path / "weights").mkdir()
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "weights" / "1.safetensors")
    write(tmp_path, {"a": "weights/1.safetensors"})
    assert open_checkpoint(tmp_path).files == [tmp_path / "weights" / "1.safetensors"]


def test_a_file_far_too_large_for_an_index_is_refused_without_reading_it(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    with open(file, "wb") as handle:
        handle.truncate(1 << 40)  # a hole: it takes no room, and reading it would take all memory
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes, an index at most"):
        read_weight_index(file)
