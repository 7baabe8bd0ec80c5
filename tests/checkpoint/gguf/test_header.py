"""Headers of GGUF files: every way in which one can be bad is refused by name."""

import io
import os
import struct
from pathlib import Path

import pytest

from helpers.gguf_files import ARCHITECTURE, array, header, key, tensor, text
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.checkpoint.gguf.header_bytes import MAX_HEADER_BYTES, HeaderBytes
from moeflow.errors import CheckpointError

U32, STRING, ARRAY = 4, 8, 9


def u32(value):
    return struct.pack("<I", value)


def with_keys(*keys):
    return header([ARCHITECTURE, *keys])


def with_tensors(*tensors, data=64, **options):
    return header(tensors=tensors, data=data, **options)


def nested(depth):
    """A value of arrays in arrays."""
    return b"".join(array(ARRAY, 1) for _ in range(depth - 1)) + array(U32, 1, u32(7))


FILES = {
    "empty": (b"", "begins with b''"),
    "short magic": (b"GG", "begins with b'GG'"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", r"begins with b'\\x10"),
    "no version": (b"GGUF\3", r"truncated or damaged: the header goes on to byte 8, and the file has 5 bytes"),
    "version 1": (header(version=1), "version 1 of GGUF.*newer llama.cpp"),
    "version 4": (header(version=4), "version 4 of GGUF.*Update moeflow"),
    "version 0": (header(version=0), "version 0 of GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian.*version number 3 is byte-swapped"),
    "no counts": (b"GGUF" + struct.pack("<IQ", 3, 1), "the header goes on to byte 24"),
    "too many tensors": (header(num_tensors=1 << 63), "announces 9,223,372,036,854,775,808 tensors, at most 65,536"),
    "too many keys": (header(num_keys=(1 << 64) - 1), "announces 18,446,744,073,709,551,615 keys, at most 5,000"),
    "fewer keys than announced": (header(num_keys=40, data=0, alignment=1), "key number 2 of 40 goes on to byte"),
    "fewer tensors than announced": (header(num_tensors=3, data=0, alignment=1), "tensor number 1 of 3 goes on"),
}
KEYS = {
    "no architecture": (header([key("a", U32, u32(1))]), "no text under the key 'general.architecture'"),
    "architecture of another kind": (header([key("general.architecture", U32, u32(1))]), "no text under the key"),
    "empty architecture": (header([key("general.architecture", STRING, text(""))]), "no text under the key"),
    "twice": (with_keys(ARCHITECTURE), "key 'general.architecture' stands there twice"),
    "name longer than the file": (with_keys(struct.pack("<Q", 1 << 62)), "key number 2 of 2 has a name of 4,611,686"),
    "name not UTF-8": (with_keys(key(b"\xff\xfe", U32, u32(1))), "key number 2 of 2 has a name that is not UTF-8"),
    "kind": (with_keys(key("a", 13, b"")), "key 'a' has a value of kind number 13"),
    "kind of elements": (with_keys(key("a", ARRAY, array(99, 0))), "key 'a' has an array of kind number 99"),
    "text longer than the file": (
        with_keys(key("a", STRING, struct.pack("<Q", 1 << 62))),
        "truncated or damaged: key 'a' goes on to byte 4,611,686,018,427,38",
    ),
    "text cut": (with_keys(key("a", STRING, struct.pack("<Q", 300))), "truncated or damaged: key 'a' goes on to byte"),
    "2^60 numbers": (with_keys(key("a", ARRAY, array(U32, 1 << 60))), "key 'a' goes on to byte 4,611,686,018,427,38"),
    "2^60 texts": (with_keys(key("a", ARRAY, array(STRING, 1 << 60))), "key 'a' goes on to byte 9,223,372,036,85"),
    "2^60 arrays": (with_keys(key("a", ARRAY, array(ARRAY, 1 << 60))), "key 'a' has arrays in arrays"),
    "array with a text that is cut": (
        with_keys(key("a", ARRAY, array(STRING, 2, text("x") + struct.pack("<Q", 1 << 40)))),
        "key 'a' goes on to byte 1,099,511,",
    ),
    "too deep": (with_keys(key("a", ARRAY, nested(4))), "key 'a' has arrays in arrays, more than 3 deep"),
    "very deep": (with_keys(key("a", ARRAY, nested(100_000))), "key 'a' has arrays in arrays, more than 3 deep"),
    **{
        f"alignment {value}": (with_keys(key("general.alignment", U32, u32(value))), "'general.alignment' is .*power")
        for value in (0, 3, 24, 1 << 21, (1 << 32) - 1)
    },
    "alignment of another kind": (
        with_keys(key("general.alignment", 10, struct.pack("<Q", 32))),
        "'general.alignment' has a value of kind number 10, it must be 4",
    ),
}
TENSORS = {
    "twice": (with_tensors(tensor("a"), tensor("a", offset=32)), "tensor 'a' stands there twice"),
    "long name": (with_tensors(tensor("n" * 65)), "tensor number 1 of 1 has a name of 65 bytes, at most 64"),
    "name not UTF-8": (with_tensors(tensor(b"\xff")), "tensor number 1 of 1 has a name that is not UTF-8"),
    "five dimensions": (with_tensors(tensor("a", (1,) * 5)), "tensor 'a' has 5 dimensions, at most 4"),
    "2^32 dimensions": (with_tensors(text("a") + u32((1 << 32) - 1)), "tensor 'a' has 4,294,967,295 dimensions"),
    "zero": (with_tensors(tensor("a", (0, 4))), r"tensor 'a' has the shape \[0, 4\], which cannot be"),
    "overflow": (
        with_tensors(tensor("a", (1 << 32, 1 << 32))),
        r"tensor 'a' has the shape \[4294967296, 4294967296\], which cannot be",
    ),
    "largest": (with_tensors(tensor("a", ((1 << 64) - 1,) * 4)), r"tensor 'a' has the shape .* which cannot be"),
    "type": (with_tensors(tensor("a", kind=4242)), "tensor 'a' is of type number 4242, and moeflow knows .*Q4_K"),
    "removed type": (with_tensors(tensor("a", kind=4)), "tensor 'a' is of type number 4,"),
    "row": (with_tensors(tensor("a", (256, 33), 2)), "tensor 'a' has rows of 33 values, and Q4_0 has blocks of 32"),
    "scalar of blocks": (with_tensors(tensor("a", (), 2)), "tensor 'a' has rows of 1 values"),
    "unaligned": (with_tensors(tensor("a", offset=4)), "tensor 'a' begins at offset 4, which is no multiple of 32"),
    "behind the file": (
        with_tensors(tensor("a", offset=1 << 40)),
        r"truncated or damaged: tensor 'a' of F32 \[4\] ends at byte 1,099,511,",
    ),
    "far behind the file": (with_tensors(tensor("a", offset=(1 << 64) - 32)), "tensor 'a' of F32 .* ends at byte 18,4"),
    "cut": (with_tensors(tensor("a", (5,)), data=19), "truncated or damaged: tensor 'a'"),
    "overlap": (
        with_tensors(tensor("a", (9,)), tensor("b", offset=32), data=128),
        r"tensor 'b' begins at byte 192, and tensor 'a' ends at 196",
    ),
    "same place": (with_tensors(tensor("a"), tensor("b")), "tensor '[ab]' begins at byte .*, and tensor '[ab]' ends"),
}


def cases(*tables):
    return [
        pytest.param(content, match, id=f"{kind} {name}")
        for kind, table in zip(("file", "key", "tensor"), tables, strict=True)
        for name, (content, match) in table.items()
    ]


@pytest.mark.parametrize(("content", "match"), cases(FILES, KEYS, TENSORS))
def test_what_cannot_be_is_refused_by_name_in_a_short_line(tmp_path, content, match):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


def test_every_truncation_is_refused(tmp_path):
    keys = [ARCHITECTURE, key("tokens", ARRAY, array(STRING, 2, text("a") + text("b"))), key("n", U32, u32(3))]
    content = header(keys, [tensor("x", (2, 2)), tensor("y", offset=32)], data=48)
    (tmp_path / "m.gguf").write_bytes(content)
    open_gguf(tmp_path / "m.gguf")
    for length in range(len(content)):
        (tmp_path / "m.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            open_gguf(tmp_path / "m.gguf")


def test_a_header_longer_than_any_is_refused_without_reading_it(tmp_path):
    content = with_keys(key("a", STRING, struct.pack("<Q", 1 << 33)))
    with open(tmp_path / "m.gguf", "wb") as handle:
        handle.write(content)
        handle.truncate(1 << 34)
    with pytest.raises(CheckpointError, match=rf"key 'a' goes on to byte .*at most {MAX_HEADER_BYTES:,} bytes"):
        open_gguf(tmp_path / "m.gguf")


def test_texts_that_are_not_utf_8_are_refused_when_they_are_asked_for(tmp_path):
    keys = key("one", STRING, text(b"\xff")), key("many", ARRAY, array(STRING, 2, text("a") + text(b"\xc3")))
    (tmp_path / "m.gguf").write_bytes(with_keys(*keys))
    found = open_gguf(tmp_path / "m.gguf")
    for name in ("one", "many"):
        with pytest.raises(CheckpointError, match=rf"m\.gguf: key '{name}' has a text that is not UTF-8"):
            found.metadata[name]
    assert found.metadata["general.architecture"] == "qwen3moe"


def test_a_value_that_takes_too_much_memory_is_refused_when_it_is_asked_for(tmp_path):
    (tmp_path / "m.gguf").write_bytes(with_keys(key("many", ARRAY, array(0, 2_500_000, bytes(2_500_000)))))
    found = open_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="'many' would take up to 100,000,064 bytes of memory, at most 100,000,0"):
        found.metadata["many"]


def test_a_path_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, match in [("nowhere.gguf", "No such file"), ("pipe.gguf", "is not a file"), ("a\0.gguf", "null byte")]:
        with pytest.raises(CheckpointError, match=match):
            open_gguf(tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused():
    reader = HeaderBytes(Path("m.gguf"), io.BytesIO(bytes(10)), 100)
    with pytest.raises(CheckpointError, match=r"m\.gguf became shorter while it was read"):
        reader.load(20)
