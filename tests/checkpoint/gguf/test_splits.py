"""Splits of a GGUF file: any of them opens all, and those that do not belong together are refused by name."""

import shutil
import struct

import gguf
import numpy as np
import pytest

from helpers.gguf_files import (
    ARCHITECTURE,
    header,
    key,
    split_keys,
    tensor,
    text,
    write_gguf,
)
from moeflow.checkpoint.gguf.file import open_gguf
from moeflow.checkpoint.reading.file_stamp import check_unchanged
from moeflow.errors import CheckpointError

TENSORS = {f"blk.{n}.weight": np.full((2, 4), n, np.float32) for n in range(5)}


@pytest.fixture
def files(tmp_path):
    """Three splits, written by the package gguf."""
    return write_gguf(tmp_path / "m.gguf", TENSORS, {"general.name": "splits"}, tensors_a_split=2)


def write(folder, number, content, *, count=2, name="m"):
    file = folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
    file.write_bytes(content)
    return file


def split(number, *, count=2, total=2, tensors=None, keys=(), first=ARCHITECTURE):
    """A split with one tensor, `t0` or `t1`."""
    keys = [*([first] if number == 0 else []), *keys, *split_keys(number, count, total)]
    return header(keys, [tensor(f"t{number}")] if tensors is None else tensors)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_split_opens_all(files, given):
    found = open_gguf(files[given])
    assert found.files == files
    assert list(found.tensors) == list(TENSORS)
    assert found.metadata["general.name"] == "splits"
    for name, values in TENSORS.items():
        entry = found.tensors[name]
        content = files[entry.file].read_bytes()[entry.begin : entry.begin + entry.num_bytes]
        assert content == values.tobytes()
    readers = [gguf.GGUFReader(file) for file in files]
    expected = {t.name: (n, t.data_offset) for n, reader in enumerate(readers) for t in reader.tensors}
    assert {name: (entry.file, entry.begin) for name, entry in found.tensors.items()} == expected


def test_a_split_that_changes_is_refused(files):
    found = open_gguf(files[1])
    check_unchanged(found.files, found.stamps)
    files[2].write_bytes(files[2].read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf changed on disk"):
        check_unchanged(found.files, found.stamps)


def test_missing_splits_are_named(files):
    files[0].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 splits are missing beside it, the first is m-00001-of-00003"):
        open_gguf(files[1])
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003\.gguf cannot be read"):
        open_gguf(files[0])


@pytest.mark.parametrize("name", ["m.gguf", "m-00002-of-00003.gguf", "m-00001-of-00004.gguf", "m-1-of-3.gguf"])
def test_a_split_under_another_name_is_refused(files, name, tmp_path):
    renamed = tmp_path / "other" / name
    renamed.parent.mkdir()
    shutil.copy(files[0], renamed)
    with pytest.raises(CheckpointError, match=r"is split 1 of 3 by its header, .* end in -00001-of-00003\.gguf"):
        open_gguf(renamed)


def test_a_whole_file_may_have_a_split_s_name(tmp_path):
    file = write(tmp_path, 2, header(tensors=[tensor("a")]), count=3)
    assert open_gguf(file).files == [file]
    one = write(tmp_path, 0, header([ARCHITECTURE, *split_keys(0, 1, 1)], [tensor("a")]), count=1)
    assert open_gguf(one).tensors["a"].file == 0


def test_splits_without_tensors_in_the_first_are_read(tmp_path):
    write(tmp_path, 0, split(0, total=1, tensors=[]))
    file = write(tmp_path, 1, split(1, total=1))
    assert open_gguf(file).tensors["t1"].file == 1


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (
            split(0),
            split(1, total=9),
            r"0000[12]-of-00002\.gguf is split [12] of 2 of a model of [29] tensors by",
        ),
        (split(0), header(tensors=[tensor("t1")]), r"00002-of-00002\.gguf (is a whole file by its header|)"),
        (split(0), split(1, keys=[ARCHITECTURE]), None),
        (
            split(0),
            split(1, keys=[key("general.architecture", 8, text("llama"))]),
            r"m-00002-of-00002\.gguf is of the architecture 'llama', m-00001-of-00002\.gguf of 'qwen3moe'",
        ),
        (split(0), split(1, keys=[key("general.architecture", 4, b"\1\0\0\0")]), "of the architecture '1'"),
        (split(0), split(1, tensors=[tensor("t0")]), r"m-00002-of-00002\.gguf: tensor 't0' is in m-00001-of-00002"),
        (split(0, total=3), split(1, total=3), "its 2 splits have 2 tensors, and 3 by their headers"),
        (split(0, total=1), split(1, total=1), r"m-00002-of-00002\.gguf: the splits up to this one have 2 tensors"),
        (split(0, first=key("a", 0, b"\1")), split(1), r"m-00001-of-00002\.gguf has no text under the key 'general\.a"),
        (split(0)[:-60], split(1), r"m-00001-of-00002\.gguf is truncated or damaged: tensor 't0'"),
    ],
    ids=["total", "whole", "same architecture", "architecture", "kind", "twice", "few", "many", "none", "cut"],
)
def test_splits_that_do_not_belong_together_are_refused_by_name(tmp_path, first, second, match, given):
    files = write(tmp_path, 0, first), write(tmp_path, 1, second)
    if match is None or (given == 1 and b"split" not in second):
        open_gguf(files[given])
        return
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(files[given])
    assert len(str(caught.value)) < 600 + 2 * len(str(tmp_path))


def test_a_split_that_has_another_s_number_is_refused(tmp_path):
    file = write(tmp_path, 0, split(0))
    write(tmp_path, 1, split(0))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.gguf is split 1 of 2 .* asks for split 2 of 2"):
        open_gguf(file)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (split_keys(0, -1, 1), "'split.count' of a split must be a count, and it has another value"),
        ([key("split.count", 6, struct.pack("<f", 2))], "'split.no' of a split must be a count, and it is missing"),
        ([*split_keys(0, 2, 1)[:2]], "'split.tensors.count' of a split must be a count, and it is missing"),
        (split_keys(2, 2, 1), r"split number 2 \(from 0\) of 2, which cannot be"),
        (split_keys(1, 1_000_000, 1), r"split number 1 \(from 0\) of 1,000,000, which cannot be"),
        ([key("split.no", 7, b"\1"), *split_keys(0, 2, 1)[1:]], "'split.no' of a split must be a count"),
    ],
)
def test_numbers_of_splits_that_cannot_be_are_refused(tmp_path, keys, match):
    file = write(tmp_path, 0, header([ARCHITECTURE, *keys], [tensor("a")]))
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(file)
    assert file.name in str(caught.value)


@pytest.mark.slow
def test_163_splits_of_many_tensors_are_joined(tmp_path):
    count, a_split = 163, 280
    for number in range(count):
        keys = split_keys(number, count, count * a_split)
        tensors = [tensor(f"blk.{number}.ffn_up.{n}.weight", (2048, 256), 12, n * 294912) for n in range(a_split)]
        content = header([ARCHITECTURE, *keys] if number == 0 else keys, tensors, data=0)
        file = write(tmp_path, number, content, count=count)
        with open(file, "ab") as handle:
            handle.truncate(len(content) + a_split * 294912)
    found = open_gguf(file)
    assert len(found.files) == count
    assert len(found.tensors) == count * a_split
    assert {entry.file for entry in found.tensors.values()} == set(range(count))
