"""Checkpoints from their headers: what is read, and every way an input can be bad."""

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.large_checkpoint import write_large_checkpoint
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.errors import CheckpointError, ModelSourceError


@pytest.fixture
def folder(tmp_path):
    """Two shards and an index."""
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.ones(5, np.float16)}, tmp_path / "model-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_entries_point_at_the_tensors_bytes(folder):
    checkpoint = open_checkpoint(folder)
    entry = checkpoint.tensors["a"]
    data = checkpoint.files[entry.file].read_bytes()[entry.begin : entry.begin + entry.num_bytes]
    assert np.array_equal(np.frombuffer(data, np.float32).reshape(entry.shape), np.arange(6).reshape(2, 3))
    assert (entry.dtype, checkpoint.tensors["b"].dtype) == ("F32", "F16")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelSourceError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_missing_shard_is_named(folder):
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing.*model-2\.safetensors"):
        open_checkpoint(folder)


def test_truncated_shard_is_named(folder):
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"]{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    ],
    ids=["empty", "short", "huge header", "not json", "list", "no fields", "not utf-8"],
)
def test_corrupt_header_is_named(folder, data):
    (folder / "model-1.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        open_checkpoint(folder)


def test_header_whose_sizes_cannot_be_is_refused(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / "model-1.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"'a'.*cannot be"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "a\\b"])
def test_index_that_names_a_file_outside_the_folder_is_refused(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(folder)


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(folder):
    weight_map = {"a": "model-1.safetensors", "ghost": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="'ghost' is not in model-2"):
        open_checkpoint(folder)


def test_index_that_is_not_json_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        open_checkpoint(folder)


def test_pickled_checkpoint_is_never_opened_and_the_way_out_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"never unpickles.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


_OPEN_LARGE = """
import sys, time
from moeflow.checkpoint.headers import open_checkpoint
begin = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
print(len(checkpoint.tensors), len(checkpoint.files), time.perf_counter() - begin)
from moeflow.hardware import process_memory_bytes
print(process_memory_bytes()[1])  # not ru_maxrss, which a fork inherits from a large parent
"""


@pytest.mark.slow
def test_671b_index_opens_from_its_headers_in_little_memory(tmp_path):
    try:
        num_tensors = write_large_checkpoint(tmp_path)
    except OSError as error:
        pytest.skip(f"this filesystem has no sparse files of this size: {error}")
    run = subprocess.run([sys.executable, "-c", _OPEN_LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    counts, peak = run.stdout.strip().splitlines()
    assert counts.split()[:2] == [str(num_tensors), "163"]
    assert int(peak) < 300e6
    shutil.rmtree(tmp_path)
