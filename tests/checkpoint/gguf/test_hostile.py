"""Any bytes whatever: a GGUF file is refused or read as the package gguf reads it, in little memory."""

import contextlib
import struct
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.gguf_files import ARCHITECTURE, TYPES, array, header, key, random_tensor, tensor, text, write_gguf
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.checkpoint.gguf.header import MAX_TENSORS
from moeflow.checkpoint.gguf.header_bytes import MAX_HEADER_BYTES
from moeflow.errors import CheckpointError

_ODD = (0, 1, 2, 3, 5, 8, 9, 12, 13, 24, 31, 32, 33, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 60, 1 << 63)
_METADATA = {
    "general.name": "Größe",
    "tokenizer.ggml.tokens": ["a", "bc", "🙂"],
    "tokenizer.ggml.scores": [0.5, 1.0],
    "flag": True,
    "count": 7,
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The bytes of a whole file and of the two splits of another."""
    folder = tmp_path_factory.mktemp("real")
    tensors = {
        "token_embd.weight": random_tensor((4, 32), TYPES.Q8_0),
        "blk.0.ffn_up_exps.weight": random_tensor((2, 2, 256), TYPES.Q4_K),
        "blk.0.attn_norm.weight": np.ones(8, np.float32),
    }
    files = write_gguf(folder / "w.gguf", tensors, _METADATA, alignment=32)
    files += write_gguf(folder / "m.gguf", tensors, _METADATA, tensors_a_split=2)
    return [file.read_bytes() for file in files]


def read_or_refused(file):
    """Open a file and decode all its metadata; return it, None where it was refused."""
    found, refusal = None, ""
    tracemalloc.start()
    try:
        found = open_gguf(file)
        for name in found.metadata:
            with contextlib.suppress(CheckpointError):
                found.metadata[name]
    except CheckpointError as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6
    if found is None:
        assert str(file.parent) in refusal
        assert len(refusal) < 1000 + 2 * len(str(file))
        return None
    sizes = [split.stat().st_size for split in found.files]
    assert all(24 < e.begin < e.begin + e.num_bytes <= sizes[e.file] for e in found.tensors.values())
    return found


def check_as_gguf_reads_it(file, found):
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, UnicodeDecodeError):
        return  # such as arrays of many dimensions, which it does not read
    places = {expected.name: (expected.data_offset, expected.n_bytes) for expected in reader.tensors}
    assert {name: (entry.begin, entry.num_bytes) for name, entry in found.tensors.items()} == places


@pytest.mark.slow
@settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    base=st.integers(0, 2),
    flipped=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), max_size=3),
    numbers=st.lists(st.tuples(st.integers(0, 700), st.sampled_from(["<I", "<Q"]), st.sampled_from(_ODD)), max_size=2),
    cut=st.one_of(st.none(), st.none(), st.integers(0, 3000)),
    doubled=st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 700), st.integers(1, 60))),
)
def test_damaged_files_are_refused_or_read(tmp_path, real, base, flipped, numbers, cut, doubled):
    data = bytearray(real[base])
    for place, bits in flipped:
        data[place % len(data)] ^= bits
    for place, form, number in numbers:
        struct.pack_into(form, data, place % (len(data) - 8), number % (1 << 8 * struct.calcsize(form)))
    if doubled is not None:
        data[doubled[0] : doubled[0]] = data[doubled[0] : sum(doubled)]
    names = ["w.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for name, content in zip(names, real, strict=True):
        (tmp_path / name).write_bytes(content)
    file = tmp_path / names[base]
    file.write_bytes(data[:cut])
    found = read_or_refused(file)
    if found is not None and len(found.files) == 1:
        check_as_gguf_reads_it(file, found)
    if base:
        read_or_refused(tmp_path / names[3 - base])


@pytest.mark.slow
@settings(
    max_examples=500,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    counts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=24),
            st.sampled_from(_ODD).map(lambda number: struct.pack("<Q", number)),
            st.integers(0, 13).map(lambda number: struct.pack("<I", number)),
            st.sampled_from(["a", "general.alignment", "split.count"]).map(text),
        ),
        max_size=12,
    ),
    prefix=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0"]),
)
def test_random_bytes_are_refused_or_read(tmp_path, counts, pieces, prefix):
    begin = prefix + struct.pack("<QQ", counts[0], counts[1] + 1) + ARCHITECTURE if len(prefix) == 8 else prefix
    (tmp_path / "m.gguf").write_bytes(begin + b"".join(pieces))
    found = read_or_refused(tmp_path / "m.gguf")
    if found is not None:
        check_as_gguf_reads_it(tmp_path / "m.gguf", found)


def many_texts():
    """The most tensors, of the longest names, and as many texts as a header then has room for."""
    names = [f"{number:08d}{chr(0x1F642) * 14}" for number in range(MAX_TENSORS)]
    tensors = [tensor(name, (1,), 24, 32 * number) for number, name in enumerate(names)]
    room = MAX_HEADER_BYTES - sum(map(len, tensors)) - 1000
    count = room // 10 // 8
    texts = [key(f"texts{number}", 9, array(8, count, bytes(8 * count))) for number in range(10)]
    return header([ARCHITECTURE, *texts], tensors, data=32 * MAX_TENSORS)


def one_text():
    """A text as long as a header, which would take four times as much memory."""
    length = MAX_HEADER_BYTES - 1000
    return header([ARCHITECTURE, key("text", 8, text("\U0001f642".encode() + bytes(length)))])


def longest_text():
    """The longest text that is decoded."""
    return header([ARCHITECTURE, key("text", 8, text("\U0001f642".encode() + bytes(24_900_000)))])


def many_arrays():
    """Empty arrays in arrays, as many as are allowed."""
    return header([ARCHITECTURE, key("arrays", 9, array(9, 9_999, array(9, 0) * 9_999))])


_OPEN = """
import sys, time
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.errors import CheckpointError
from moeflow.hardware import process_memory_bytes
before = process_memory_bytes()[1]
found, num_read = open_gguf(sys.argv[1]), 0
for name in found.metadata:
    try:
        num_read += found.metadata[name] is not None
    except CheckpointError:
        pass
print(len(found.tensors), num_read, process_memory_bytes()[1] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "num_tensors", "num_read"),
    [(many_texts, MAX_TENSORS, 11), (one_text, 0, 1), (longest_text, 0, 2), (many_arrays, 0, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_largest_headers_take_less_than_200_mb(tmp_path, content, num_tensors, num_read):
    (tmp_path / "m.gguf").write_bytes(content())
    run = subprocess.run(
        [sys.executable, "-c", _OPEN, str(tmp_path / "m.gguf")], capture_output=True, text=True, check=True
    )
    *counts, peak = map(int, run.stdout.split())
    assert counts == [num_tensors, num_read]
    assert peak < 200e6
