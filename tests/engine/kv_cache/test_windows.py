"""Windows: positions as stretches against sets of them, and a tree with windows against what was computed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helpers.small_slots import TINY, TINY_POSITION, name_of, write_names
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import first_needed, joined, last_place, missing, wanted

WINDOW = 3
LAYOUT = {0: TINY[0], 1: TINY[0]._replace(window=WINDOW)}
STRETCHES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda one: (one[0], sum(one))), max_size=5)


def positions(stretches):
    return {position for begin, end in stretches for position in range(begin, end)}


def needed(place, window=WINDOW):
    """The positions that the next one sees, without itself."""
    return {position for position in range(place) if place - position < window}


def test_the_first_position_that_is_needed_is_the_first_that_the_next_one_sees():
    for place in range(20):
        for window in range(1, 12):
            assert set(range(first_needed(place, window), place)) == needed(place, window)


@given(STRETCHES, st.integers(0, 40), st.integers(0, 9))
def test_what_is_joined_or_missing_is_each_position_once(stretches, begin, count):
    there, gaps = joined(stretches), missing(stretches, begin, begin + count)
    for found in (there, gaps):
        assert sum(end - low for low, end in found) == len(positions(found)), "one is there twice"
    assert positions(there) == positions(stretches)
    assert positions(gaps) == set(range(begin, begin + count)) - positions(stretches)


@given(STRETCHES, st.integers(1, 6), st.integers(0, 40))
def test_the_last_place_is_the_last_whose_window_is_there(stretches, window, most):
    there = positions(stretches)
    places = [
        place for place in range(most + 1) if needed(place, window) <= there and (place - 1 in there or window == 1)
    ]
    assert last_place(stretches, window, most) == max(places, default=0)


@given(st.sets(st.integers(0, 300)), st.integers(0, 250), st.integers(0, 300), st.integers(1, 40))
def test_what_is_wanted_serves_the_end_and_each_mark_whose_window_is_there(marks, origin, more, window):
    place = origin + window - 1 + more
    stretches = wanted(marks, origin, place, window)
    assert joined(stretches) == [one for one in stretches if one[0] < one[1]] or stretches[-1] == (place, place)
    assert min(begin for begin, _ in stretches) >= origin
    assert stretches[-1][1] == place
    for mark in {place, *(mark for mark in marks if mark <= place and first_needed(mark, window) >= origin)}:
        assert needed(mark, window) <= positions(stretches)


def slot_of(tokens, room=0):
    """A slot with these tokens computed; each layer names what it was computed of."""
    slot = KeyValueSlot.empty(LAYOUT, len(tokens) + room)
    write_names(slot, None, tokens)
    slot.write(1, 0, *slot.read(0, len(tokens)))
    return slot


class WindowedTree(RuleBasedStateMachine):
    """A tree whose second layer has a window, from which new slots go on."""

    def __init__(self):
        super().__init__()
        self.tree = PrefixTree(WINDOW)

    @rule(text=st.text("ab", min_size=1, max_size=60), room=st.integers(0, 2), mark=st.integers(0, 60))
    def answer(self, text, room, mark):
        tokens = list(map(ord, text))
        place = self.tree.longest(None, tokens)
        assert place <= self.tree.common(None, tokens) <= len(tokens)
        slot = slot_of(tokens, room)  # what a model would compute
        begun = KeyValueSlot.empty(LAYOUT, len(tokens))
        self.tree.copy(None, tokens[:place], begun)
        for layer, first in ((0, 0), (1, first_needed(place, WINDOW))):
            for found, whole in zip(begun.read(layer, place), slot.read(layer, place), strict=True):
                assert torch.equal(found[:, :, first:], whole[:, :, first:])
        slot.marks.add(mark)
        slot.move_window([], (min(place, len(tokens) - 1), len(tokens) + room), len(tokens))
        self.tree.keep(None, tokens, slot)
        assert self.tree.common(None, tokens) == len(tokens)

    @rule(num_tokens=st.none() | st.integers(1, 40))
    def drop(self, num_tokens):
        before = self.tree.num_bytes
        assert self.tree.drop(num_tokens) == (before > 0)
        assert self.tree.num_bytes < before or not before

    @invariant()
    def each_position_is_kept_once(self):
        self.tree.check_integrity(TINY_POSITION)


TestWindowedTree = WindowedTree.TestCase
TestWindowedTree.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_a_kept_end_is_a_place_to_go_on_and_the_middle_of_a_run_is_none():
    tree, tokens = PrefixTree(WINDOW), list(range(100))
    tree.keep(None, tokens, slot_of(tokens))
    assert [tree.longest(None, tokens[:count]) for count in (100, 70, 68, 67, 40)] == [100, 70, 68, 0, 0]
    assert tree.drop(10)
    assert tree.num_tokens == 90
    assert tree.drop(30), "what no sequence can go on behind leaves too"
    assert (tree.num_tokens, tree.num_bytes) == (0, 0)


def test_what_a_window_has_left_behind_reads_as_zeros_and_native_steps_find_position_zero():
    slot = slot_of(range(20))
    before = slot.addresses((0, 1)).copy()
    slot.move_window([(2, 5)], (10, 25), 20)
    keys, values = slot.read(1, 20)
    names = [float(name_of(None, range(place + 1))) for place in range(20)]
    assert keys.flatten().tolist() == [0.0] * 10 + names[10:]
    assert values.flatten().tolist() == [0.0] * 10 + [-one for one in names[10:]]
    assert slot.aside[0].keys[1].flatten().tolist() == names[2:5]
    after = slot.addresses((0, 1))
    assert after[0].tolist() == before[0].tolist()
    assert after[1].tolist() == [slot.keys[1].data_ptr() - 10 * 8, slot.values[1].data_ptr() - 10 * 8, 15]
    assert slot.nbytes == 20 * TINY_POSITION + (15 + 3) * TINY_POSITION
