"""GGUF files from their headers: places and metadata as the package gguf has them."""

import pickle
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from helpers.gguf_files import (
    ARCHITECTURE,
    TYPES,
    Typed,
    header,
    key,
    large_vocabulary,
    random_tensor,
    tensor,
    write_gguf,
)
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.checkpoint.reading.file_stamp import check_unchanged
from moeflow.errors import CheckpointError

KINDS = gguf.GGUFValueType
METADATA = {
    "qwen3moe.block_count": 4,
    "qwen3moe.rope.freq_base": 1e6,
    "general.name": "Größe 🙂",
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "", "Ġb", "🙂", "x" * 300],
    "tokenizer.ggml.scores": [0.5, -1.25, 3.0],
    "rope.dimension_sections": [1, 2, 3],
    "some.flags": Typed([True, False, True], KINDS.ARRAY, KINDS.BOOL),
    "some.bytes": Typed([0, 255, 7], KINDS.ARRAY, KINDS.UINT8),
    "u8": Typed(200, KINDS.UINT8),
    "i8": Typed(-3, KINDS.INT8),
    "u16": Typed(60000, KINDS.UINT16),
    "i16": Typed(-30000, KINDS.INT16),
    "i32": Typed(-(1 << 31), KINDS.INT32),
    "u64": Typed((1 << 64) - 1, KINDS.UINT64),
    "i64": Typed(-(1 << 63), KINDS.INT64),
    "f64": Typed(0.1, KINDS.FLOAT64),
}


@pytest.fixture
def tensors():
    """One of each type, in one to four dimensions."""
    found = {
        f"blk.0.{kind.name.lower()}.weight": random_tensor((3, 2 * gguf.GGML_QUANT_SIZES[kind][0]), kind, seed=kind)
        for kind in TYPES
        if kind not in {TYPES.I8, TYPES.I16, TYPES.I64, TYPES.BF16}
    }
    return {
        **found,
        "bf16": (np.arange(8, dtype=np.uint16).reshape(2, 4).view(np.uint8), TYPES.BF16),
        "i8": np.arange(5, dtype=np.int8),
        "i16": np.arange(4, dtype=np.int16),
        "i64": np.arange(3, dtype=np.int64),
        "experts": random_tensor((4, 3, 512), TYPES.Q4_K),
        "four": random_tensor((2, 1, 3, 5)),
    }


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_places_and_metadata_are_those_of_the_package_gguf(tmp_path, tensors, alignment):
    (file,) = write_gguf(tmp_path / "m.gguf", tensors, METADATA, alignment=alignment)
    found, reader = open_gguf(file), gguf.GGUFReader(file)
    assert found.files == [file]
    assert list(found.tensors) == [expected.name for expected in reader.tensors]
    for expected in reader.tensors:
        entry = found.tensors[expected.name]
        assert entry == (
            0,
            expected.tensor_type.name,
            tuple(reversed(expected.shape.tolist())),
            expected.data_offset,
            expected.n_bytes,
        )
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert dict(found.metadata) == fields
    assert all(type(found.metadata[name]) is type(value) for name, value in fields.items())


def test_bytes_at_a_place_are_the_tensors(tmp_path, tensors):
    (file,) = write_gguf(tmp_path / "m.gguf", tensors)
    content = file.read_bytes()
    for name, entry in open_gguf(file).tensors.items():
        written = tensors[name][0] if isinstance(tensors[name], tuple) else tensors[name]
        assert content[entry.begin : entry.begin + entry.num_bytes] == written.tobytes()


def test_every_kind_of_value_comes_back(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {}, METADATA)
    metadata = open_gguf(file).metadata
    for name, value in METADATA.items():
        assert metadata[name] == (value.value if isinstance(value, Typed) else value), name
    assert "nothing" not in metadata
    assert metadata.get("nothing", 3) == 3
    with pytest.raises(KeyError):
        metadata["nothing"]


def test_version_2_is_read(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(tensors=[tensor("a", (2, 4), 1)], version=2))
    assert open_gguf(tmp_path / "m.gguf").tensors["a"][1:3] == ("F16", (2, 4))


def test_arrays_in_arrays_come_back(tmp_path):
    inner = [struct.pack("<IQ", 5, 2) + struct.pack("<2i", 1, 2), struct.pack("<IQ", 8, 0)]
    nested = key("nested", 9, struct.pack("<IQ", 9, 2) + b"".join(inner))
    (tmp_path / "m.gguf").write_bytes(header([ARCHITECTURE, nested]))
    assert open_gguf(tmp_path / "m.gguf").metadata["nested"] == [[1, 2], []]


def test_gaps_bytes_behind_the_last_tensor_and_any_order_are_allowed(tmp_path):
    tensors = [tensor("b", (4,), 0, 64), tensor("a", (4,), 0, 0), tensor("scalar", (), 0, 32)]
    (tmp_path / "m.gguf").write_bytes(header(tensors=tensors, data=200))
    places = open_gguf(tmp_path / "m.gguf").tensors
    assert [places[name].begin - places["a"].begin for name in ("a", "scalar", "b")] == [0, 32, 64]
    assert places["scalar"].shape == ()
    assert places["scalar"].num_bytes == 4


def test_a_last_tensor_without_padding_is_read(tmp_path):
    content = header(tensors=[tensor("a", (3,))], data=12)
    (tmp_path / "m.gguf").write_bytes(content)
    assert open_gguf(tmp_path / "m.gguf").tensors["a"].num_bytes == 12


def test_a_file_without_tensors_is_a_vocabulary(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(data=0, alignment=1))
    assert open_gguf(tmp_path / "m.gguf").tensors == {}


def test_a_found_file_can_be_sent_to_another_process(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {"a": np.ones(4, np.float32)}, METADATA)
    found = open_gguf(file)
    assert pickle.loads(pickle.dumps(found)) == found
    assert repr(found.metadata) == f"Metadata({len(METADATA) + 1} keys of {file})"


def test_a_file_that_changes_is_refused(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {"a": np.ones(4, np.float32)})
    found = open_gguf(file)
    check_unchanged(found.files, found.stamps)
    with open(file, "ab") as handle:
        handle.write(b"x")
    with pytest.raises(CheckpointError, match=r"m\.gguf changed on disk"):
        check_unchanged(found.files, found.stamps)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf is gone"):
        check_unchanged(found.files, found.stamps)


_OPEN = """
import sys
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.hardware import process_memory_bytes
before = process_memory_bytes()[1]
found = open_gguf(sys.argv[1])
opened = process_memory_bytes()[1]
num_tokens = len(found.metadata["tokenizer.ggml.tokens"])
print(num_tokens, len(found.tensors), opened - before, process_memory_bytes()[1] - before)
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_little_memory_until_it_is_asked_for(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {"a": np.ones(4, np.float32)}, large_vocabulary(262_000, 515_000))
    run = subprocess.run([sys.executable, "-c", _OPEN, str(file)], capture_output=True, text=True, check=True)
    num_tokens, num_tensors, opened, decoded = map(int, run.stdout.split())
    assert (num_tokens, num_tensors) == (262_000, 1)
    assert opened < 80e6
    assert decoded < 150e6


def test_opening_never_reads_further_than_the_header(tmp_path):
    content = header(tensors=[tensor("a", (1 << 34,), 24)], data=0)
    with open(tmp_path / "m.gguf", "wb") as handle:
        handle.write(content)
        handle.truncate(len(content) + (1 << 34))  # a hole: it takes no room, and reading it would take all memory
    assert open_gguf(tmp_path / "m.gguf").tensors["a"].num_bytes == 1 << 34
