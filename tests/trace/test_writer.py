"""A trace is appended to whatever interrupted it before, and never overwritten or written by two processes."""

import numpy as np
import pytest
from safetensors import safe_open

from helpers.trace_files import FORMAT, random_rows, write_trace
from moeflow.errors import TraceError
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
