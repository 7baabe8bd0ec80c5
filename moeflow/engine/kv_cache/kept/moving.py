"""Moving: what is kept of a sequence's beginning becomes its slot, so that it does not lie twice while it runs.

Knows the tree, room and shapes. Knows nothing of sequences.
"""

from collections.abc import Hashable
from contextlib import suppress

from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.room import Room
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sequence import MIN_SHARED_TOKENS


def moved_slot(
    scaling: Hashable,
    tokens: list[int],
    kept: PrefixTree,
    room: Room,
    layout: dict[int, LayerShape],
    num_bytes: int,
    num_positions: int,
) -> tuple[KeyValueSlot, int] | None:
    """Return a slot into which the leaf has moved that ends a sequence's beginning.

    Args:
        scaling: of the sequence's keys.
        tokens: those that it may have from others.
        kept: the tree.
        room: of the slot and the tree.
        layout: of the slot.
        num_bytes: that the slot takes.
        num_positions: that it has.

    Returns:
        The slot and the number of its tokens. None where the beginning ends inside a leaf or where others branch, and
        where there is no room: then nothing has changed; where the machine has no memory, the leaf is gone.
    """
    leaf = kept.leaf_of(scaling, tokens)
    if leaf is None or leaf.end < MIN_SHARED_TOKENS or not room.make(num_bytes, num_positions, leaf):
        return None
    if room.hold(num_bytes - leaf.movable_bytes, num_positions):
        with suppress(RuntimeError):
            return kept.move(leaf, layout, num_positions), leaf.end
    room.settle()
    return None
