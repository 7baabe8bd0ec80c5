"""The tree of kept beginnings, against an oracle that has every beginning apart."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helpers.small_slots import TINY, TINY_POSITION, has_names, named_slot
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.slots import KeyValueSlot

SCALINGS = st.sampled_from([None, 7])
TOKENS = st.text("ab", min_size=1, max_size=8) | st.text("abc", min_size=1, max_size=3)


def kept_slot(tree, scaling, tokens):
    """A slot with a copy of these kept tokens."""
    slot = KeyValueSlot.empty(TINY, len(tokens))
    tree.copy(scaling, tokens, slot)
    return slot


class TreeMachine(RuleBasedStateMachine):
    """A tree of kept beginnings, and the strings that it must have."""

    def __init__(self):
        super().__init__()
        self.tree = PrefixTree()
        self.kept = {None: set(), 7: set()}  # every beginning

    def longest(self, scaling, tokens):
        lengths = range(len(tokens), 0, -1)
        return next((length for length in lengths if tokens[:length] in self.kept[scaling]), 0)

    @rule(scaling=SCALINGS, tokens=TOKENS, room=st.integers(0, 3))
    def keep(self, scaling, tokens, room):
        self.tree.keep(scaling, list(map(ord, tokens)), named_slot(scaling, tokens, room))
        self.kept[scaling] |= {tokens[: length + 1] for length in range(len(tokens))}

    @rule(scaling=SCALINGS, tokens=TOKENS)
    def look_up(self, scaling, tokens):
        found = self.tree.longest(scaling, list(map(ord, tokens)))
        assert found == self.longest(scaling, tokens)
        slot = kept_slot(self.tree, scaling, list(map(ord, tokens[:found])))
        assert has_names(slot, scaling, tokens[:found])

    @precondition(lambda self: any(self.kept.values()))
    @rule(num_tokens=st.none() | st.integers(1, 8))
    def drop(self, num_tokens):
        assert self.tree.drop(num_tokens)
        now = {scaling: {one for one in kept if self.has(scaling, one)} for scaling, kept in self.kept.items()}
        gone = [(scaling, one) for scaling, kept in self.kept.items() for one in kept - now[scaling]]
        self.kept = now
        leaf, first = (choose((one for _, one in gone), key=len) for choose in (max, min))
        assert sorted(one for _, one in gone) == [leaf[:length] for length in range(len(first), len(leaf) + 1)]
        assert len({scaling for scaling, _ in gone}) == 1, "more than one leaf left"
        assert num_tokens is None or len(gone) <= num_tokens

    @precondition(lambda self: not any(self.kept.values()))
    @rule()
    def nothing_to_drop(self):
        assert not self.tree.drop()

    @rule()
    def clear(self):
        self.tree.clear()
        self.kept = {None: set(), 7: set()}

    def has(self, scaling, tokens):
        """Whether the tree has a beginning; looked up without a note of its use."""
        path = self.tree._path(scaling, list(map(ord, tokens)))
        return sum(count for _, count in path) == len(tokens)

    @invariant()
    def every_beginning_is_kept_once(self):
        self.tree.check_integrity(TINY_POSITION)
        assert self.tree.num_tokens == sum(map(len, self.kept.values()))
        found = {None: set(), 7: set()}
        for scaling, path in self.tree.sequences():
            text = "".join(map(chr, (token for node in path for token in node.tokens)))
            found[scaling] |= {text[: length + 1] for length in range(len(text))}
        assert found == self.kept


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_leaf_that_was_not_used_for_the_longest_time_leaves_first():
    tree = PrefixTree()
    for text in ("aaaa", "aabb", "cc", "aabbd"):
        tree.keep(None, list(text), named_slot(None, text))
    tree.longest(None, list("cc"))
    tree.longest(None, list("aaaa"))
    left = []
    while tree.num_tokens:
        before = {"".join(token for node in path for token in node.tokens) for _, path in tree.sequences()}
        assert tree.drop()
        tree.check_integrity(TINY_POSITION)
        left.append(before - {"".join(token for node in path for token in node.tokens) for _, path in tree.sequences()})
    assert left == [{"aabbd"}, {"aabb"}, {"cc"}, {"aaaa"}, {"aa"}]
    assert not tree.drop()
    assert not tree._roots


def test_a_use_of_the_beginning_of_a_run_keeps_all_of_it():
    tree = PrefixTree()
    for text in ("aaaa", "bbbb"):
        tree.keep(None, list(text), named_slot(None, text))
    assert tree.longest(None, list("aac")) == 2
    tree.drop()
    assert tree.longest(None, list("aaaa")) == 4


def test_only_the_end_of_a_leaf_leaves_where_no_more_is_needed_and_all_where_nothing_can_be_copied(monkeypatch):
    tree = PrefixTree()
    tree.keep(None, list("abcdef"), named_slot(None, "abcdef"))
    assert tree.drop(2)
    assert has_names(kept_slot(tree, None, list("abcd")), None, "abcd")
    tree.check_integrity(TINY_POSITION)

    def without_memory(slot, begin, end):
        raise RuntimeError("no memory")

    monkeypatch.setattr(KeyValueSlot, "give_up", without_memory)
    assert tree.drop(2)
    assert (tree.num_tokens, tree.num_bytes) == (0, 0)


def test_what_there_is_no_memory_for_is_not_kept_and_all_else_is(monkeypatch):
    tree = PrefixTree()
    tree.keep(None, list("abcd"), named_slot(None, "abcd"))

    def without_memory(slot, begin, end):
        raise RuntimeError("no memory")

    for name, text in (("part", "abx"), ("give_up", "abx"), ("give_up", "xyz"), ("give_up", "abcde")):
        monkeypatch.setattr(KeyValueSlot, name, without_memory)
        with pytest.raises(RuntimeError):
            tree.keep(None, list(text), named_slot(None, text))
        monkeypatch.undo()
        tree.check_integrity(TINY_POSITION)
        assert tree.num_tokens == 4
    assert has_names(kept_slot(tree, None, list("abcd")), None, "abcd")
