"""ExpertStore: the bytes of an expert, in few large reads, direct where the filesystem takes it."""

import os
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moeflow.checkpoint.layer_source import Conversion, LayerSource, PieceTable
from moeflow.checkpoint.store import COALESCE_GAP_BYTES, ExpertStore
from moeflow.core import ExpertKey, LayerLayout, RecordLayout
from moeflow.errors import ClosedModelError, ExpertReadError


def page_aligned(num_bytes):
    raw = np.zeros(num_bytes + 4096, np.uint8)
    return raw[-raw.ctypes.data % 4096 :][:num_bytes]


@pytest.fixture
def file(tmp_path):
    """A megabyte of noise."""
    path = tmp_path / "data.bin"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    return path


def layer(*pieces, num_bytes, conversions=()):
    """A layer of one expert made of (begin, num_bytes, offset in the record) pieces of file 0."""
    record = RecordLayout.pack([("w", "U8", (num_bytes,))])
    tables = tuple(
        (PieceTable("U8", (size,), size, array("H", [0]), array("Q", [begin])), offset)
        for begin, size, offset in pieces
    )
    return LayerSource(LayerLayout("layers.0.experts", 1, record), tables, conversions)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("begin", "size"), [(0, 4096), (4096, 8192), (1, 1), (4095, 2), (12345, 54321), (1000000, 48576)]
)
def test_any_byte_range_is_read_exactly(file, direct, begin, size):
    store = ExpertStore([file], [layer((begin, size, 0), num_bytes=size)], direct=direct)
    record = page_aligned(-(-size // 4096) * 4096)
    store.read(ExpertKey(0, 0), record)
    assert record[:size].tobytes() == file.read_bytes()[begin : begin + size]
    assert store.mode == "buffered" if not direct else store.mode in ("direct", "buffered")
    store.close()


def test_neighbours_become_one_read_and_strangers_do_not(file):
    near = layer((100, 50, 64), (0, 60, 0), (200, 10, 128), num_bytes=256)
    far = layer((0, 100, 0), (100 + COALESCE_GAP_BYTES + 1, 100, 128), num_bytes=256)
    store = ExpertStore([file], [near, far])
    record, data = page_aligned(4096), file.read_bytes()
    store.read(ExpertKey(0, 0), record)
    assert store.stats()["reads"] == 1
    assert record[64:114].tobytes() == data[100:150]
    assert record[128:138].tobytes() == data[200:210]
    store.read(ExpertKey(1, 0), record)
    assert store.stats()["reads"] == 3
    store.close()


def test_pieces_of_one_expert_may_lie_in_several_files(file, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * 100)
    tables = (
        (PieceTable("U8", (10,), 10, array("H", [0]), array("Q", [5])), 0),
        (PieceTable("U8", (10,), 10, array("H", [1]), array("Q", [90])), 64),
    )
    source = LayerSource(LayerLayout("l", 1, RecordLayout.pack([("w", "U8", (74,))])), tables, ())
    store, record = ExpertStore([file, other], [source]), page_aligned(4096)
    store.read(ExpertKey(0, 0), record)
    assert record[:10].tobytes() == file.read_bytes()[5:15]
    assert record[64:74].tobytes() == b"x" * 10
    store.close()


def test_conversion_gets_the_raw_pieces_in_order(file):
    def convert(expert, pieces, record):
        record[:4] = pieces[1][:4]
        record[4:8] = pieces[0][:4]

    tables = tuple(PieceTable("U8", (4,), 4, array("H", [0]), array("Q", [begin])) for begin in (40, 8))
    source = layer(num_bytes=8, conversions=(Conversion(tables, convert),))
    store, record, data = ExpertStore([file], [source]), page_aligned(4096), file.read_bytes()
    store.read(ExpertKey(0, 0), record)
    assert record[:8].tobytes() == data[8:12] + data[40:44]
    store.close()


def test_many_threads_read_at_once(file):
    sources = [layer((number * 3001, 3001, 0), num_bytes=3001) for number in range(300)]
    store, data = ExpertStore([file], sources), file.read_bytes()

    def read(number):
        record = page_aligned(4096)
        store.read(ExpertKey(number, 0), record)
        return record[:3001].tobytes() == data[number * 3001 : (number + 1) * 3001]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(300)))
    assert store.stats()["bytes"] >= 300 * 3001
    store.close()


def test_file_that_became_shorter_is_an_error_that_names_expert_and_file(file):
    store = ExpertStore([file], [layer((900_000, 100_000, 0), num_bytes=100_000)])
    os.truncate(file, 950_000)
    with pytest.raises(ExpertReadError, match=r"expert 0 of layers\.0\.experts.*data\.bin.*truncated"):
        store.read(ExpertKey(0, 0), page_aligned(102_400))
    store.close()


def test_file_that_is_gone_is_an_error_that_names_it(file):
    store = ExpertStore([file], [layer((0, 10, 0), num_bytes=10)])
    file.unlink()
    with pytest.raises(ExpertReadError, match=r"data\.bin"):
        store.read(ExpertKey(0, 0), page_aligned(4096))
    store.close()


def test_closed_store_says_so(file):
    store = ExpertStore([file], [layer((0, 10, 0), num_bytes=10)])
    store.close()
    with pytest.raises(ClosedModelError):
        store.read(ExpertKey(0, 0), page_aligned(4096))
