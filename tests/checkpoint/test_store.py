"""ExpertStore: the bytes of an expert, in few large reads, direct where the filesystem takes it."""

import os
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moeflow.checkpoint.layer_source import Conversion, LayerSource, PieceTable
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.reading.parts import COALESCE_GAP_BYTES, one_by_one
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, LayerLayout, RecordLayout
from moeflow.errors import CheckpointError, ClosedModelError, ExpertReadError


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


def backwards(run, parts):
    for part in reversed(parts):
        run(part)
        yield part


@pytest.mark.parametrize("share", [one_by_one, backwards])
@pytest.mark.parametrize("part_bytes", [None, 4096, 10_000, 1 << 20])
@pytest.mark.parametrize(
    "pieces",
    [
        [(8192, 50_001, 0)],  # read in place
        [(8193, 50_001, 0)],
        [(100_000, 9000, 0), (3, 20_000, 9000), (20_005, 7, 29_000), (700_000, 30_000, 29_007)],
    ],
)
def test_what_has_landed_is_right_at_once_and_is_all_of_the_record(file, pieces, part_bytes, share):
    size = sum(num_bytes for _, num_bytes, _ in pieces)
    expected = np.zeros(size, np.uint8)
    for begin, num_bytes, offset in pieces:
        expected[offset : offset + num_bytes] = np.frombuffer(file.read_bytes()[begin : begin + num_bytes], np.uint8)
    store, record, covered = ExpertStore([file], [layer(*pieces, num_bytes=size)]), page_aligned(1 << 17), []

    def landed(begin, end):
        np.testing.assert_array_equal(record[begin:end], expected[begin:end])
        covered.append((begin, end))

    taken = store.read(ExpertKey(0, 0), record, landed=landed, share=share, part_bytes=part_bytes)
    assert taken == store.stats()["bytes"]
    np.testing.assert_array_equal(record[:size], expected)
    ends = [0, *(end for _, end in sorted(covered))]
    assert ends[:-1] == [begin for begin, _ in sorted(covered)]
    assert ends[-1] == size
    assert (len(covered) > len(pieces)) == (part_bytes in (4096, 10_000))
    store.close()


def test_what_arithmetic_makes_lands_when_it_is_made(file):
    def convert(expert, pieces, record):
        record[:8192] = pieces[0][::-1]

    table = PieceTable("U8", (8192,), 8192, array("H", [0]), array("Q", [40]))
    store = ExpertStore([file], [layer(num_bytes=8192, conversions=(Conversion((table,), convert),))])
    record, seen = page_aligned(8192), []
    store.read(ExpertKey(0, 0), record, landed=lambda *run: seen.append((run, record.tobytes())), part_bytes=4096)
    assert seen == [((0, 8192), file.read_bytes()[40 : 40 + 8192][::-1])]
    store.close()


class FailingStore(ExpertStore):
    """Fails when it reads of one file."""

    failing = 1

    def _read_some(self, part, done):
        if part.file == self.failing:
            raise OSError(5, "Input/output error")
        return super()._read_some(part, done)


def test_a_piece_that_cannot_be_read_is_named_by_its_own_file(file, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * 100)
    tables = tuple(
        (PieceTable("U8", (10,), 10, array("H", [number]), array("Q", [5])), 64 * number) for number in (0, 1)
    )
    source = LayerSource(LayerLayout("l", 1, RecordLayout.pack([("w", "U8", (74,))])), tables, ())
    store, ended = FailingStore([file, other], [source]), []

    def share(run, parts):
        try:
            yield from one_by_one(run, parts)
        finally:
            ended.append(True)

    with pytest.raises(ExpertReadError, match=r"expert 0 of l could not be read from .*other\.bin: Input/output error"):
        store.read(ExpertKey(0, 0), page_aligned(4096), share=share)
    assert ended
    store.failing = None
    store.read(ExpertKey(0, 0), page_aligned(4096), share=share)
    store.close()


def test_what_the_callers_function_raises_is_not_the_disks(file):
    store, ended = ExpertStore([file], [layer((0, 8192, 0), num_bytes=8192)]), []

    def landed(begin, end):
        raise OSError("the link failed")

    def share(run, parts):
        try:
            yield from one_by_one(run, parts)
        finally:
            ended.append(True)

    with pytest.raises(OSError, match="the link failed"):
        store.read(ExpertKey(0, 0), page_aligned(8192), landed=landed, share=share, part_bytes=4096)
    assert ended, "the parts were left running"
    store.close()


def test_buffers_are_whole_huge_pages_and_counted_as_large_as_they_are(tmp_path):
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(3 << 20))
    sizes = (10, 3 << 19, (2 << 20) + 1)
    store = ExpertStore([path], [layer((1, size, 0), num_bytes=size) for size in sizes])
    for number, room in enumerate((2 << 20, 2 << 20, 4 << 20)):
        for part_bytes in (None, 4096):
            store.read(ExpertKey(number, 0), page_aligned(3 << 20), part_bytes=part_bytes)
            assert store.staging_bytes == room == store._staging.buffer.nbytes
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
    with pytest.raises(ExpertReadError, match=r"expert 0 of layers\.0\.experts.*data\.bin changed.*and has 950,000"):
        store.read(ExpertKey(0, 0), page_aligned(102_400))
    store.close()


def test_file_whose_name_is_gone_or_another_files_is_still_read(file, tmp_path):
    store, data, record = ExpertStore([file], [layer((0, 10, 0), num_bytes=10)]), file.read_bytes(), page_aligned(4096)
    other = tmp_path / "other"
    other.write_bytes(bytes(len(data)))
    for change in (lambda: other.rename(file), file.unlink):
        change()
        record[:] = 0
        store.read(ExpertKey(0, 0), record)
        assert record[:10].tobytes() == data[:10]
    store.close()


def test_file_that_was_written_to_is_refused_until_it_is_as_before(file):
    """Of the same size, and wherever the writing was: which bytes were read before it cannot be known."""
    store, stamp = ExpertStore([file], [layer((0, 10, 0), num_bytes=10)]), file.stat()
    with open(file, "r+b") as handle:
        handle.seek(500_000)
        handle.write(b"other")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ExpertReadError, match=r"data\.bin changed on disk.*it was written to.*load the model again"):
        store.read(ExpertKey(0, 0), page_aligned(4096))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    store.read(ExpertKey(0, 0), page_aligned(4096))
    store.close()


def test_file_that_changed_or_went_before_it_is_opened_is_named(file, tmp_path):
    before, source, fds = FileStamp.of(file), layer((0, 10, 0), num_bytes=10), len(os.listdir("/proc/self/fd"))
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(before.mtime_ns, before.mtime_ns))
    other.rename(file)
    with pytest.raises(CheckpointError, match=r"data\.bin changed on disk while it was opened \(another file"):
        ExpertStore([file], [source], stamps=[before])
    with pytest.raises(CheckpointError, match=r"gone\.bin cannot be opened"):
        ExpertStore([file, tmp_path / "gone.bin"], [source])
    assert len(os.listdir("/proc/self/fd")) == fds


def test_closed_store_says_so(file):
    store = ExpertStore([file], [layer((0, 10, 0), num_bytes=10)])
    store.close()
    with pytest.raises(ClosedModelError):
        store.read(ExpertKey(0, 0), page_aligned(4096))
