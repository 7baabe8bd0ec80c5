"""A trace is appended to whatever interrupted it before, and never overwritten or written by two processes."""

import numpy as np
import pytest
from safetensors import safe_open

from helpers.full_disk import with_full_disk
from helpers.kill_points import kill_at_each_line
from helpers.trace_files import FORMAT, random_rows, write_trace
from moeflow import atomic_file, file_lock
from moeflow.errors import TraceError
from moeflow.trace import header, writer
from moeflow.trace.buffered_rows import BufferedRows
from moeflow.trace.format import TraceFormat
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.writer import TraceWriter


@pytest.fixture
def written(tmp_path):
    return tmp_path / "t.safetensors", write_trace(tmp_path / "t.safetensors")


def test_append_goes_on_after_the_last_sequence(written):
    path, rows = written
    with TraceWriter(path, FORMAT, append=True) as writer:
        assert (writer.next_sequence, writer.num_rows) == (2, 10)
        more = random_rows(writer, 4, seed=1)
        writer.write(more)
    trace = RoutingTrace.open(path)
    np.testing.assert_array_equal(trace.experts, np.concatenate([rows["experts"], more["experts"]]))
    assert trace.sequence_numbers.tolist() == [0, 1, 2, 3]


def test_killed_append_is_read_to_where_it_was_complete_and_continued(written):
    path, rows = written
    with open(path, "ab") as file:
        file.write(b"\xff" * (FORMAT.dtype.itemsize * 3 + 5))
    np.testing.assert_array_equal(RoutingTrace.open(path).experts, rows["experts"])
    with TraceWriter(path, FORMAT, append=True) as writer:
        more = random_rows(writer, 1, seed=1)
        writer.write(more)
    trace = RoutingTrace.open(path)
    np.testing.assert_array_equal(trace.experts, np.concatenate([rows["experts"], more["experts"]]))
    with safe_open(path, "numpy") as file:  # the rest of the killed append is gone
        assert file.get_tensor("rows").shape[0] == 11


def test_rows_are_readable_before_the_writer_closes(tmp_path):
    writer = TraceWriter(tmp_path / "t", FORMAT)
    writer.write(random_rows(writer, 3))
    assert len(RoutingTrace.open(tmp_path / "t")) == 3
    writer.close()


def test_a_second_writer_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with TraceWriter(tmp_path / "t", FORMAT), pytest.raises(TraceError, match="another process"):
        TraceWriter(tmp_path / "t", FORMAT, append=True)


def test_an_existing_file_is_not_overwritten(written):
    before = written[0].read_bytes()
    with pytest.raises(TraceError, match="exists already"):
        TraceWriter(written[0], FORMAT)
    assert written[0].read_bytes() == before


def test_appending_to_a_trace_without_rows_begins_it(tmp_path):
    TraceWriter(tmp_path / "t", FORMAT).close()
    with TraceWriter(tmp_path / "t", FORMAT, append=True) as writer:
        writer.write(random_rows(writer, 2))
    assert len(RoutingTrace.open(tmp_path / "t")) == 2


def test_rows_of_another_shape_are_refused(written):
    with pytest.raises(TraceError, match="lookahead"):
        TraceWriter(written[0], TraceFormat((8, 8, 6), 2, "0123456789abcdef", lookahead=(2, 4)), append=True)


def record(path, num_prompts=3):
    """Record prompts of two rows each, as the command does: what is not there yet."""
    with TraceWriter(path, FORMAT, append=True) as file:
        for number in range(file.begin_recording("0123", num_prompts), num_prompts):
            for seed in (2 * number, 2 * number + 1):
                rows = random_rows(file, 1, seed)
                rows["sequence"] = number
                file.write(rows)
            file.end_prompt()


@pytest.mark.slow
def test_killed_in_any_line_a_recording_is_readable_and_goes_on_to_the_same_bytes(tmp_path):
    record(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    experts = RoutingTrace.open(tmp_path / "whole").experts
    target = tmp_path / "t"
    for place in kill_at_each_line(lambda: record(target), writer, header, atomic_file, file_lock):
        if target.exists() and target.stat().st_size:
            with TraceWriter(target, FORMAT, append=True) as file:
                num_rows = file.num_rows
            if num_rows:
                np.testing.assert_array_equal(RoutingTrace.open(target).experts, experts[:num_rows], place)
        if not target.exists() or target.read_bytes() != whole:
            record(target)
        assert target.read_bytes() == whole, place
        target.unlink()


def test_a_full_disk_keeps_the_rows_before_and_leaves_no_file_without_a_header(tmp_path):
    path = tmp_path / "t"
    end = 4096 + 5 * FORMAT.dtype.itemsize

    def fill():
        file = TraceWriter(path, FORMAT)
        rows = BufferedRows(file)
        rows.add(random_rows(file, 4))
        rows.flush()
        rows.add(random_rows(file, 4, seed=1))
        with pytest.raises(TraceError, match=r"t cannot be written: File too large\. Make room.* Rows before are safe"):
            rows.close()
        rows.close()

    assert with_full_disk(end, fill) == 0
    assert len(RoutingTrace.open(path)) == 4
    assert path.stat().st_size == end - FORMAT.dtype.itemsize

    def begin():
        with pytest.raises(TraceError, match="cannot be written: File too large"):
            TraceWriter(tmp_path / "new", FORMAT)
        assert not (tmp_path / "new").exists()

    assert with_full_disk(1000, begin) == 0
