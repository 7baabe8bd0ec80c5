"""Routing traces: what is written is read back, in views of the file, and a damaged or foreign file is refused."""

import os

import numpy as np
import pytest
from safetensors import safe_open

from helpers.trace_files import FORMAT, write_trace
from moeflow.errors import TraceError
from moeflow.trace.format import DECODE, TraceFormat
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.writer import TraceWriter


@pytest.fixture
def written(tmp_path):
    return tmp_path / "t.safetensors", write_trace(tmp_path / "t.safetensors")


def test_what_is_written_is_read_back(written):
    path, rows = written
    trace = RoutingTrace.open(path)
    assert trace.format == FORMAT
    assert len(trace) == 10
    assert (trace.num_layers, trace.num_experts, trace.experts_per_layer, trace.top_k) == (3, 8, (8, 8, 6), 2)
    assert trace.fingerprint == "0123456789abcdef"
    assert trace.sequence_facts == []
    assert trace.lookahead is None
    for name in ("experts", "weights", "sequence", "phase"):
        np.testing.assert_array_equal(getattr(trace, name), rows[name])
    np.testing.assert_array_equal(trace.token_ids, rows["token_id"])
    assert trace.experts.dtype == np.uint8
    assert trace.weights.dtype == np.float16


def test_arrays_are_views_of_the_file(written):
    trace = RoutingTrace.open(written[0])
    assert trace.experts.strides[0] == trace.weights.strides[0] == FORMAT.dtype.itemsize
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0] = 0


def test_safetensors_reads_a_closed_trace(written):
    path, rows = written
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "moeflow-trace"
        assert file.get_tensor("rows").tobytes() == rows.tobytes()


@pytest.mark.parametrize("cut", [1, 100, 4097 - 4096])
def test_truncated_rows_are_refused(written, cut):
    os.truncate(written[0], written[0].stat().st_size - cut)
    with pytest.raises(TraceError, match="truncated"):
        RoutingTrace.open(written[0])
    with pytest.raises(TraceError, match="truncated"):
        TraceWriter(written[0], FORMAT, append=True)


@pytest.mark.parametrize("size", [9, 100, 4095])
def test_truncated_header_is_refused(written, size):
    os.truncate(written[0], size)
    with pytest.raises(TraceError, match=r"truncated|corrupt"):
        RoutingTrace.open(written[0])


def test_empty_traces_are_refused(tmp_path):
    TraceWriter(tmp_path / "t", FORMAT).close()
    with pytest.raises(TraceError, match="empty"):
        RoutingTrace.open(tmp_path / "t")
    (tmp_path / "nothing").touch()
    with pytest.raises(TraceError, match="empty"):
        RoutingTrace.open(tmp_path / "nothing")


def test_foreign_files_are_refused(tmp_path, mixtral_folder):
    texts = {"a": b"hello, this is text\n" * 500, "b": b"x", "c": bytes(5000), "d": b'{"a": 1}\n' * 1000}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match="not a routing trace"):
            RoutingTrace.open(tmp_path / name)
    with pytest.raises(TraceError, match="not a routing trace"):
        RoutingTrace.open(next(mixtral_folder.glob("*.safetensors")))
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.open(tmp_path / "absent")


def test_a_newer_version_is_refused(written):
    data = written[0].read_bytes()
    written[0].write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1))
    with pytest.raises(TraceError, match="version 2"):
        RoutingTrace.open(written[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'\\"top_k', b'\\"top_j'), (b'"dtype":"U8"', b'"dtype":"I8"'), (b'\\"u1\\"', b'\\"z1\\"'), (b"[10,", b"[-1,")],
)
def test_a_corrupt_header_is_refused(written, old, new):
    data = written[0].read_bytes()
    assert old in data
    written[0].write_bytes(data.replace(old, new))
    with pytest.raises(TraceError, match="corrupt"):
        RoutingTrace.open(written[0])


def test_another_models_trace_is_refused_by_name(written):
    other = TraceFormat((8, 8, 6), 2, "fedcba9876543210")
    with pytest.raises(TraceError, match=r"0123456789abcdef.*fedcba9876543210"):
        TraceWriter(written[0], other, append=True)
    with pytest.raises(TraceError, match=r"0123456789abcdef.*fedcba9876543210"):
        RoutingTrace.open(written[0]).require_fingerprint("fedcba9876543210")
    RoutingTrace.open(written[0]).require_fingerprint("0123456789abcdef")


def test_sequences_are_found_where_rows_interleave(written):
    path, rows = written
    trace = RoutingTrace.open(path)
    assert [np.arange(10)[group].tolist() for group in trace.sequences()] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    chosen = trace.select([1])
    np.testing.assert_array_equal(chosen.experts, rows["experts"][1::2])
    assert chosen.sequence_numbers.tolist() == [1]
    assert chosen.sequences() == [slice(0, 5)]
    assert len(trace.select([])) == 0
    assert trace.select([]).sequences() == []


def test_decode_leaves_prefill_out(written):
    trace = RoutingTrace.open(written[0]).decode()
    assert len(trace) == 8
    assert (trace.phase == DECODE).all()
    assert trace.decode() is trace


def test_many_experts_need_two_bytes_and_none_is_never_an_expert(tmp_path):
    assert TraceFormat((255,), 1, "m").none == 255
    assert TraceFormat((256,), 1, "m").none == 65535
    with TraceWriter(tmp_path / "t", TraceFormat((256,) * 3, 8, "m", has_weights=False, ranked=False)) as writer:
        rows = writer.new_rows(1)
        rows["experts"][0, 1, :3] = [0, 255, 7]
        writer.write(rows)
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.experts[0, 1].tolist() == [0, 255, 7] + 5 * [65535]
    assert trace.weights is None
    assert not trace.format.ranked


def test_lookahead_and_facts_are_kept_whatever_room_they_need(tmp_path):
    facts = [{"dataset": f"d{number}", "finished": True} for number in range(1000)]
    format = TraceFormat((64,) * 5, 4, "m", lookahead=(2, 6))
    with TraceWriter(tmp_path / "t", format, sequence_facts=facts) as writer:
        rows = writer.new_rows(2)
        rows["lookahead"][0] = np.arange(60).reshape(5, 2, 6)
        writer.write(rows)
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.sequence_facts == facts
    np.testing.assert_array_equal(trace.lookahead[0], np.arange(60).reshape(5, 2, 6))
    assert (trace.lookahead[1] == trace.none).all()
    with open(tmp_path / "t", "rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 4096 == 0
