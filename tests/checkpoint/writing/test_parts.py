"""The order in which parts are written: each when the last shard that it needs is there, and none before."""

from array import array

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.checkpoint.writing.parts import cut_turns, order_parts, shards_of
from moeflow.core import ExpertKey, LayerLayout, RecordLayout

DENSE = {"last": TensorEntry(2, "U8", (1,), 0, 1), "first": TensorEntry(0, "U8", (1,), 0, 1)}


def layer(*pieces):
    """A layer's source; each piece names the shard of every expert."""
    count = len(pieces[0])
    tables = [PieceTable("U8", (1,), 1, array("H", files), array("Q", [0] * count)) for files in pieces]
    layout = LayerLayout("l", count, RecordLayout.pack([("w", "U8", (len(pieces),))]))
    return LayerSource(layout, tuple((table, place) for place, table in enumerate(tables)), ())


def test_a_shards_dense_tensors_come_before_the_experts_that_it_completes():
    layers = [layer([2, 2], [0, 2]), layer([0, 1], [1, 0])]
    parts = order_parts(DENSE, layers, packed=False)
    assert [(part.what, part.shards) for part in parts] == [
        ("first", (0,)),
        (ExpertKey(1, 0), (0, 1)),
        (ExpertKey(1, 1), (0, 1)),
        ("last", (2,)),
        (ExpertKey(0, 0), (0, 2)),
        (ExpertKey(0, 1), (2,)),
    ]
    assert [shards_of(turn) for turn in cut_turns(parts)] == [{0}, {0, 1}, {0, 2}]
    assert [shards_of(turn) for turn in cut_turns(parts[5:])] == [{2}], "what is left needs no more than its own"


def test_experts_of_a_packed_file_need_no_shard_and_come_last():
    parts = order_parts(DENSE, [layer([0, 0])], packed=True)
    assert [part.what for part in parts] == ["first", "last", ExpertKey(0, 0), ExpertKey(0, 1)]
    assert shards_of(cut_turns(parts)[-1]) == frozenset()
