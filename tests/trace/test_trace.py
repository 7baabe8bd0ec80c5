"""Routing traces: what is written is read back, in views of the file, and a damaged or foreign file is refused."""

import os

import numpy as np
import pytest
from safetensors import safe_open

from moeflow.errors import TraceError
from moeflow.trace.trace import DECODE, PREFILL, RoutingTrace, TraceFormat, TraceWriter

FORMAT = TraceFormat((8, 8, 6), 2, "0123456789abcdef", source="a test")


def random_rows(writer, num_rows, seed=0):
    """Rows of two interleaved sequences, one prefill token each."""
    rng, rows = np.random.default_rng(seed), writer.new_rows(num_rows)
    rows["token_id"] = rng.integers(0, 1000, num_rows)
    rows["sequence"] = writer.next_sequence + np.arange(num_rows) % 2
    rows["phase"] = np.where(np.arange(num_rows) < 2, PREFILL, DECODE)
    rows["experts"] = rng.integers(0, 6, rows["experts"].shape)
    if writer.format.has_weights:
        rows["weights"] = rng.random(rows["weights"].shape)
    return rows


@pytest.fixture
def written(tmp_path):
    with TraceWriter(tmp_path / "t.safetensors", FORMAT) as writer:
        rows = random_rows(writer, 10)
        writer.write(rows[:4])
        writer.write(rows[4:])
    return tmp_path / "t.safetensors", rows


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


def test_appending_to_a_trace_without_rows_begins_it(tmp_path):
    TraceWriter(tmp_path / "t", FORMAT).close()
    with TraceWriter(tmp_path / "t", FORMAT, append=True) as writer:
        writer.write(random_rows(writer, 2))
    assert len(RoutingTrace.open(tmp_path / "t")) == 2


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


def test_rows_of_another_shape_are_refused(written):
    with pytest.raises(TraceError, match="lookahead"):
        TraceWriter(written[0], TraceFormat((8, 8, 6), 2, "0123456789abcdef", lookahead=(2, 4)), append=True)


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
