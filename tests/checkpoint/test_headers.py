"""Checkpoints from their headers: what is read, and every way an input can be bad."""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
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


def test_empty_file_that_hides_the_shards_is_named(folder):
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is empty, and it comes before the shards"):
        open_checkpoint(folder)


def entry(begin, end, *, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(0, 8), "b": entry(0, 8)}, "no gap or overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "no gap or overlap"),
        ({"a": entry(8, 16)}, "no gap or overlap"),
        ({"a": entry(0, 8)}, "8 bytes behind its header's last tensor"),
        ({"a": entry(0.0, 8)}, "not a size or an offset"),
        ({"a": entry(False, 8)}, "not a size or an offset"),
        ({"a": entry(-8, 0)}, "not a size or an offset"),
        ({"a": entry(0, 8, shape=[True])}, "not a size or an offset"),
        ({"a": entry(0, 8, shape={"2": 1})}, "not a shape"),
        ({"a": entry(0, 8, dtype=["F32"])}, "corrupt header"),
        ({"a" * 9000: entry(0, 8, dtype="Q" * 9000)}, r"corrupt header.*9,031 letters"),
        (b'{"a": {}, "a": {}}', "stands there twice"),
        (b'{"a": ' + b"[" * 100_000, "corrupt header"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "not JSON"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "corrupt header"),
        ({"__metadata__": {"a": 1}}, "not a table of texts"),
        (b"{" + b" " * 4_000_001 + b"}", "header of 4,000,003 bytes for 16 bytes of tensors"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_hostile_header_is_refused_in_a_short_line(tmp_path, header, match):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_header_of_too_many_tensors_is_refused_before_it_is_read(tmp_path):
    text = b'{"data_offsets": 1,' * 200_001
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="200,001 tensors"):
        open_checkpoint(tmp_path)


def _containers(values):
    return st.one_of(
        st.lists(values, max_size=2), st.dictionaries(st.sampled_from(["x", "y", "q"]), values, max_size=3)
    )


_SIZES = st.one_of(st.integers(-1, 24), st.sampled_from([0, 4, 8, 16, True, 8.0, None, 1 << 64, "8"]))
_SHAPES = st.lists(st.one_of(st.integers(-1, 4), st.sampled_from([0, 1, 2, True, 2.0, 1 << 63])), max_size=3)
_DTYPES = st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "F6_E2M3", "F8_E8M0", "C64", "Q", "", None, 1])
_INFOS = st.one_of(
    st.fixed_dictionaries(
        {"dtype": _DTYPES, "shape": _SHAPES, "data_offsets": st.lists(_SIZES, min_size=1, max_size=3)},
        optional={"more": st.sampled_from([1, "x", [], {"a": None}])},
    ),
    st.sampled_from([None, [], 7, {}]),
)
_RIGHT = {"x": entry(0, 8), "y": entry(8, 16, dtype="BF16", shape=[2, 2]), "z": entry(16, 16, shape=[0])}
_NAMES = st.sampled_from(["x", "y", "z", "", "__metadata__", "a" * 300, "\u00e9"])


@pytest.mark.slow
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    changes=st.dictionaries(_NAMES, _INFOS, max_size=2),
    kept=st.sets(st.sampled_from(["x", "y", "z"])),
    cut=st.one_of(st.none(), st.integers(0, 250)),
    flipped=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), max_size=2),
    num_bytes=st.sampled_from([16, 8, 0, 17]),
    index=st.one_of(st.none(), st.recursive(st.sampled_from([1, None, "model-1.safetensors", "x"]), _containers)),
)
def test_any_header_and_index_is_refused_or_read_as_safetensors_reads_it(changes, kept, cut, flipped, num_bytes, index):
    text = json.dumps({**{name: _RIGHT[name] for name in sorted(kept)}, **changes}).encode()
    data = bytearray(struct.pack("<Q", len(text)) + text + bytes(range(num_bytes)))[:cut]
    for place, bits in flipped:
        if place < len(data):
            data[place] ^= bits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / ("model.safetensors" if index is None else "model-1.safetensors")
        file.write_bytes(data)
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        try:
            found = open_checkpoint(folder)
        except CheckpointError:
            return
        expected = dict(deserialize(bytes(data)))
        assert found.tensors.keys() == expected.keys()
        for name, place in found.tensors.items():
            assert data[place.begin : place.begin + place.num_bytes] == expected[name]["data"]
            assert (place.dtype, list(place.shape)) == (expected[name]["dtype"], expected[name]["shape"])
