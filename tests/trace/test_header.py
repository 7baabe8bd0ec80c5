"""Headers and checksums: a damaged trace is refused or read with the content it had; older ones are read."""

import json
import random
import re

import numpy as np
import pytest

from helpers.damage import damaged
from helpers.trace_files import FORMAT, random_rows, write_trace
from moeflow.cli.main import main
from moeflow.errors import TraceError
from moeflow.trace.format import TraceFormat
from moeflow.trace.header import TraceHeader
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.writer import TraceWriter

FIELDS = ("token_ids", "sequence", "phase", "experts", "weights", "lookahead")


def content(path):
    trace = RoutingTrace.open(path)
    trace.sequences()
    arrays = [getattr(trace, name) for name in FIELDS]
    return trace.format, trace.sequence_facts, [None if array is None else array.tobytes() for array in arrays]


@pytest.fixture
def written(tmp_path):
    """A trace with every field, facts of sequences and the rest of a killed append."""
    format = TraceFormat((8, 8, 6), 2, "0123456789abcdef", lookahead=(2, 3), source="a test")
    facts = [{"dataset": "a", "duplicate": False}, {"dataset": "b"}]
    with TraceWriter(tmp_path / "t", format, sequence_facts=facts) as writer:
        writer.begin_recording("0123", 9)
        writer.write(random_rows(writer, 7))
        writer.end_prompt()
        writer.write(random_rows(writer, 4, seed=1))
    with open(tmp_path / "t", "ab") as file:
        file.write(b"rest")
    return tmp_path / "t"


def test_a_damaged_trace_is_refused_or_read_with_the_content_it_had(written):
    data, expected, rng, told = written.read_bytes(), content(written), random.Random(0), []
    for _ in range(1500):
        written.write_bytes(damaged(data, rng, data.index(b"  ")))
        try:
            assert content(written) == expected
        except TraceError as error:
            told.append(str(error))
    assert len(told) > 1000
    assert all(text.startswith(str(written)) for text in told)


def old(path):
    """Make a trace what an older moeflow wrote: without checksums."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in ("crc32", "header_crc32", "recording"):
        header["__metadata__"].pop(name, None)
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])


def test_a_trace_without_checksums_is_read_and_appended_to(tmp_path):
    rows = write_trace(tmp_path / "t")
    old(tmp_path / "t")
    assert RoutingTrace.open(tmp_path / "t").experts.tobytes() == rows["experts"].tobytes()
    with TraceWriter(tmp_path / "t", FORMAT, append=True) as writer:
        assert writer.begin_recording("0123", 2) == 0
        writer.write(random_rows(writer, 3))
        writer.end_prompt()
    assert len(RoutingTrace.open(tmp_path / "t")) == 13
    assert b"crc32" not in (tmp_path / "t").read_bytes()


def test_a_damaged_trace_without_checksums_raises_nothing_foreign(written, capsys):
    old(written)
    data, rng, told = written.read_bytes(), random.Random(1), []
    for _ in range(1000):
        written.write_bytes(damaged(data, rng, data.index(b"  ")))
        try:
            content(written)
        except TraceError as error:
            told.append(str(error))
        else:
            assert main(["trace", "info", str(written)]) == 0
    capsys.readouterr()
    assert all(text.startswith(str(written)) for text in told)


@pytest.mark.parametrize(
    ("field", "value"), [("phase", 2), ("experts", 9), ("token_id", -2), ("weights", np.nan), ("lookahead", 8)]
)
def test_a_row_that_no_trace_holds_is_named_where_there_is_no_checksum(written, field, value):
    with TraceWriter(written, RoutingTrace.open(written).format, append=True) as writer:
        rows = random_rows(writer, 3)
        rows[field][1] = value
        writer.write(rows)
    old(written)
    with pytest.raises(TraceError, match=r"t is damaged: row 12 is none of a trace"):
        RoutingTrace.open(written)


def test_checksums_name_the_place(written):
    data = bytearray(written.read_bytes())
    data[4200] ^= 1
    written.write_bytes(data)
    with pytest.raises(TraceError, match=r"its rows, bytes 4,096 to [\d,]+, do not agree with their checksum"):
        RoutingTrace.open(written)
    data[4200] ^= 1
    place = data.index(b"0123456789abcdef")
    data[place] ^= 1
    written.write_bytes(data)
    with pytest.raises(TraceError, match=r"corrupt trace header \(its checksum does not agree\)"):
        RoutingTrace.open(written)


def test_the_header_keeps_its_length_whatever_grows():
    for layers in range(1, 80):
        header = TraceHeader.reserve(TraceFormat((64,) * layers, 8, "f" * 16, source="s" * 200))
        text = header.to_bytes()
        assert len(text) == header.data_offset
        assert re.search(rb'"header_crc32":"[0-9a-f]{8}"', text)
