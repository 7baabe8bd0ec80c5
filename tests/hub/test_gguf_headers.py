"""Headers of a GGUF file at the hub: as many bytes are fetched as its reader needs, into a file of the full size."""

import pytest

from helpers.hub_server import ID
from moeflow.errors import CheckpointError, ModelSourceError
from moeflow.hub.gguf_headers import read_remote_gguf
from moeflow.hub.repository import Repository

MB = 1 << 20


def reader(needed, seen):
    """Return a reader of headers of so many bytes."""

    def read(file):
        seen.append(file.stat().st_size)
        content = file.read_bytes()[:needed]
        if 0 in content:
            raise CheckpointError(f"{file} is truncated")
        return content

    return read


def test_more_is_fetched_while_the_headers_go_on_and_no_byte_twice(server, tmp_path):
    server.files["m.gguf"] = b"x" * (40 * MB)
    seen = []
    assert read_remote_gguf(Repository(ID), "m.gguf", tmp_path, reader(10 * MB, seen)) == b"x" * (10 * MB)
    assert seen == [40 * MB] * 2
    assert server.sent("m.gguf") == 16 * MB
    assert (tmp_path / "m.gguf").stat().st_blocks * 512 < 24 * MB


def test_headers_that_never_end_are_told_when_the_whole_file_was_looked_at(server, tmp_path):
    server.files["m.gguf"] = b"x" * (9 * MB) + b"\0" * MB
    with pytest.raises(CheckpointError, match="truncated"):
        read_remote_gguf(Repository(ID), "m.gguf", tmp_path, reader(10 * MB, []))
    assert server.sent("m.gguf") == 10 * MB


def test_all_splits_are_there_for_the_reader(server, tmp_path):
    names = [f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    server.files.update({name: bytes([65 + place]) * 3 * MB for place, name in enumerate(names)})
    read_remote_gguf(Repository(ID), names[1], tmp_path, lambda file: file.name)
    assert [(tmp_path / name).read_bytes() == server.files[name] for name in names] == [True, True]


def test_a_file_that_is_not_there_is_told_with_those_that_are(server, tmp_path):
    server.files["m.gguf"] = b"x"
    with pytest.raises(ModelSourceError, match=r"no GGUF file 'other.gguf'. It has m.gguf"):
        read_remote_gguf(Repository(ID), "other.gguf", tmp_path, lambda file: None)
