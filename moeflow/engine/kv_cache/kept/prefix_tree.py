"""Prefix tree of kept keys and values: equal beginnings are kept once, and leaves leave least recently used first.

Knows token ids and slots. Knows nothing of budgets, sequences or models.
Source: SGLang's RadixAttention (Zheng et al. 2024, section 3).
"""

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator

from moeflow.engine.kv_cache.kept.kept_runs import Node, Run, parts_between, up_from
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import Stretch, WindowPart, last_place, missing


class PrefixTree:
    """Tokens with their keys and values, by the scaling that these have.

    Args:
        window: most positions that one sees in layers with a window; 0 where no layer has one.

    Attributes:
        num_tokens: tokens kept, each with the keys and values of one position in layers without a window.
        num_bytes: of all that is kept.
    """

    def __init__(self, window: int = 0) -> None:
        self.num_tokens = self.num_bytes = 0
        self._window = window
        self._roots: dict[Hashable, Node] = {}
        # Least recently used first. A node comes before its parent, which is used whenever it is: the first is a leaf.
        self._by_use: OrderedDict[Node, None] = OrderedDict()

    @property
    def oldest(self) -> Node | None:
        """The leaf that was not used for the longest time, which leaves next; None where nothing is kept."""
        return next(iter(self._by_use), None)

    @property
    def longest_run(self) -> int:
        """The most tokens of one run."""
        return max((len(node.tokens) for node in self._by_use), default=0)

    def longest(self, scaling: Hashable, tokens: list[int]) -> int:
        """Return behind how many tokens of this beginning a sequence can go on with what is kept; note their use."""
        path = self._path(scaling, tokens)
        self._use(path[-1][0] if path else None)
        return self._last_place([node for node, _ in path], sum(count for _, count in path))

    def common(self, scaling: Hashable, tokens: list[int]) -> int:
        """Return how many tokens of this beginning are kept, with or without the window before that place."""
        return sum(count for _, count in self._path(scaling, tokens))

    def bytes_to_part(self, scaling: Hashable, tokens: list[int]) -> int:
        """Return the bytes that `part` copies."""
        return sum(node.nbytes for node, count in self._path(scaling, tokens)[-1:] if count < len(node.tokens))

    def part(self, scaling: Hashable, tokens: list[int]) -> None:
        """Let a run end where what is kept of this beginning ends, so that another may go on there.

        Raises:
            RuntimeError: there is no memory; nothing has changed.
        """
        for node, count in self._path(scaling, tokens)[-1:]:
            if count < len(node.tokens):
                self._split(node, count)

    def stretches(self, scaling: Hashable, tokens: list[int]) -> list[Stretch]:
        """Return what is kept of these tokens in layers with a window."""
        ends = [(part, node.begin + count) for node, count in self._path(scaling, tokens) for part in node.parts]
        return [(part.begin, min(part.end, end)) for part, end in ends if part.begin < end]

    def path_bytes(self, scaling: Hashable, tokens: list[int]) -> int:
        """Return the bytes of the runs along these tokens."""
        return sum(node.nbytes for node, _ in self._path(scaling, tokens))

    def copy(self, scaling: Hashable, tokens: list[int], slot: KeyValueSlot) -> None:
        """Copy the keys and values of these tokens, a beginning that `longest` told, to that of an empty slot."""
        start, path = 0, self._path(scaling, tokens)
        slot.place_window([part for node, _ in path for part in node.parts], len(tokens))
        for node, count in path:
            assert node.slot is not None, "no root"
            slot.copy_from(node.slot, count, start)
            start += count
        assert start == len(tokens), f"{start} of {len(tokens)} tokens are kept"

    def leaf_of(self, scaling: Hashable, tokens: list[int]) -> Node | None:
        """Return the leaf that ends with these tokens or before, and that a sequence of them goes on behind as a whole.

        None where there is none, and so where another run begins behind it or inside it.
        """
        path = self._path(scaling, tokens)
        if not path:
            return None
        leaf, count = path[-1]
        is_whole = count == len(leaf.tokens) and not leaf.children
        return leaf if is_whole and self._last_place([node for node, _ in path], leaf.end) == leaf.end else None

    def move(self, leaf: Node, layout: dict[int, LayerShape], num_positions: int) -> KeyValueSlot:
        """Take a leaf out, and return a slot that has all tokens up to its end; the runs before it stay.

        Layer after layer, so that hardly more memory is taken than that of the slot.

        Args:
            leaf: of `leaf_of`.
            layout: of the slot.
            num_positions: that it has room for.

        Raises:
            RuntimeError: there is no memory; the leaf is gone.
        """
        path = up_from(leaf)[::-1]
        self._remove(leaf)
        slot = KeyValueSlot.behind(layout, num_positions, [node.slot for node in path if node.slot is not None])
        slot.place_window([part for node in path for part in node.parts], leaf.end)
        slot.set_aside(leaf.parts)
        slot.marks.add(leaf.end)  # others may go on there, as they could before
        return slot

    def copied_bytes(self, scaling: Hashable, tokens: list[int], slot: KeyValueSlot) -> int:
        """Return the most bytes that `keep` copies before it releases others, beside one layer of the slot."""
        return self.bytes_to_part(scaling, tokens) + sum(part.nbytes for part in slot.worth_keeping(len(tokens)))

    def keep(self, scaling: Hashable, tokens: list[int], slot: KeyValueSlot) -> None:
        """Take from a slot what is not kept yet of these tokens, its first ones; the slot holds nothing any more.

        Raises:
            RuntimeError: there is no memory; what was kept before still is.
        """
        path = self._path(scaling, tokens)
        begin = sum(count for _, count in path)
        parts = slot.worth_keeping(len(tokens))
        node, count = path[-1] if path else (self._roots.get(scaling) or Node(), 0)
        if begin < len(tokens):
            if count < len(node.tokens):
                node = self._split(node, count)
            leaf = Node(tokens[begin:], slot.give_up(begin, len(tokens)), node, begin=begin)
            if node.parent is None:
                self._roots[scaling] = node
            node.children[leaf.tokens[0]] = leaf
            self.num_tokens += len(leaf.tokens)
            self.num_bytes += leaf.nbytes
            node = leaf
        self._use(node)
        for one in up_from(node):
            self._add_parts(one, parts)

    def drop(self, num_tokens: int | None = None) -> bool:
        """Let the leaf go that was not used for the longest time, or only its end; return whether there was one.

        Args:
            num_tokens: so many of its last tokens go, and those before that no sequence can go on behind, where it has
                more and there is memory to copy the others; None for all.
        """
        leaf = self.oldest
        if leaf is None:
            return False
        if num_tokens is not None and self._shorten(leaf, len(leaf.tokens) - num_tokens):
            return True
        self._remove(leaf)
        return True

    def clear(self) -> None:
        """Let everything go, at once: a node and its parent would wait for the garbage collector."""
        for node in [*self._by_use, *self._roots.values()]:
            node.children.clear()
        self._roots.clear()
        self._by_use.clear()
        self.num_tokens = self.num_bytes = 0

    def sequences(self) -> Iterator[tuple[Hashable, list[Node]]]:
        """Yield of each leaf its scaling and the nodes from the first run to it."""
        for scaling, root in self._roots.items():
            paths = [[child] for child in root.children.values()]
            while paths:
                path = paths.pop()
                paths += [[*path, child] for child in path[-1].children.values()]
                if not path[-1].children:
                    yield scaling, path

    def runs(self) -> Iterator[Run]:
        """Return every node, most recently used first, so that none comes before those that lead to it."""
        return map(self.run_of, reversed(self._by_use))

    def nodes(self) -> list[Node]:
        """Return every node in the order in which they leave."""
        return list(self._by_use)

    def run_of(self, node: Node) -> Run:
        """Return a node by itself."""
        assert node.slot is not None, "no root"
        path = up_from(node)
        before = [token for one in reversed(path[1:]) for token in one.tokens]
        scaling = next(scaling for scaling, root in self._roots.items() if root is path[-1].parent)
        return Run(scaling, before, node.tokens, node.slot, node.parts)

    def restore(self, run: Run) -> bool:
        """Take in a run of `runs` as the least recently used; False where what leads to it is not there, or it is."""
        path = self._path(run.scaling, run.before)
        node = path[-1][0] if path else self._roots.get(run.scaling) or Node()
        whole = sum(count for _, count in path) == len(run.before) and (not path or path[-1][1] == len(node.tokens))
        if not whole or not run.tokens or run.tokens[0] in node.children:
            return False
        if node.parent is None:
            self._roots[run.scaling] = node
        leaf = Node(run.tokens, run.slot, node, begin=len(run.before), parts=run.parts)
        node.children[run.tokens[0]] = leaf
        self._by_use[leaf] = None
        self._by_use.move_to_end(leaf, last=False)
        self.num_tokens += len(run.tokens)
        self.num_bytes += leaf.nbytes
        return True

    def check_integrity(self, position_bytes: int) -> None:
        """Assert that every node is counted with its bytes, and that the order of use is one of leaves first.

        Args:
            position_bytes: of a position in the layers without a window.
        """
        nodes = {node for _, path in self.sequences() for node in path}
        assert nodes == set(self._by_use), "a node has no place in the order of use"
        assert sum(len(node.tokens) for node in nodes) == self.num_tokens, "tokens are counted wrong"
        assert sum(node.nbytes for node in nodes) == self.num_bytes, "bytes are counted wrong"
        places = {node: place for place, node in enumerate(self._by_use)}
        for node in nodes:
            assert node.slot is not None
            assert node.slot.nbytes == len(node.tokens) * position_bytes, "a run has bytes of others"
            assert all(child.begin == node.end for child in node.children.values()), "a run begins elsewhere"
            stretches = sorted((part.begin, part.end) for part in node.parts)
            bounds = [node.begin, *(bound for stretch in stretches for bound in stretch), node.end]
            assert bounds == sorted(bounds), "a position is kept twice, or in another's run"
            assert all(places[child] < places[node] for child in node.children.values()), "a parent left first"
            assert all(first == child.tokens[0] for first, child in node.children.items()), "a run has another's name"

    def _path(self, scaling: Hashable, tokens: list[int]) -> list[tuple[Node, int]]:
        """Return the nodes along these tokens, and how many tokens of each are equal: all, in all but the last."""
        path: list[tuple[Node, int]] = []
        node, begin = self._roots.get(scaling), 0
        while node is not None and begin < len(tokens):
            node = node.children.get(tokens[begin])
            if node is None:
                break
            count = num_common(node.tokens, tokens[begin : begin + len(node.tokens)])
            path.append((node, count))
            begin += count
            if count < len(node.tokens):
                break
        return path

    def _last_place(self, path: list[Node], most: int) -> int:
        """Return behind how many tokens, at most so many, a sequence can go on with what these nodes keep."""
        if not self._window:
            return most
        return last_place([(part.begin, part.end) for node in path for part in node.parts], self._window, most)

    def _add_parts(self, node: Node, parts: list[WindowPart]) -> None:
        """Copy what a node has not yet of its positions."""
        for part in parts:
            there = [(one.begin, one.end) for one in node.parts]
            for begin, end in missing(there, max(part.begin, node.begin), min(part.end, node.end)):
                node.parts.append(part.cut(begin, end))
                self.num_bytes += node.parts[-1].nbytes

    def _split(self, node: Node, count: int) -> Node:
        """Cut a run in two behind its first tokens, and return the new node of these."""
        assert node.slot is not None, "no root"
        assert node.parent is not None, "no root"
        place = node.begin + count
        first, rest = node.slot.part(0, count), node.slot.part(count, len(node.tokens))
        before, behind = parts_between(node, node.begin, place), parts_between(node, place, node.end)
        head = Node(node.tokens[:count], first, node.parent, {node.tokens[count]: node}, node.begin, before)
        node.parent.children[head.tokens[0]] = head
        node.tokens, node.slot, node.parent, node.begin, node.parts = node.tokens[count:], rest, head, place, behind
        self._use(head)
        return head

    def _remove(self, leaf: Node) -> None:
        """Take a leaf out."""
        assert leaf.parent is not None, "no root"
        del self._by_use[leaf], leaf.parent.children[leaf.tokens[0]]
        self.num_tokens -= len(leaf.tokens)
        self.num_bytes -= leaf.nbytes
        if leaf.parent.parent is None and not leaf.parent.children:
            self._roots = {scaling: root for scaling, root in self._roots.items() if root.children}

    def _shorten(self, leaf: Node, num_tokens: int) -> bool:
        """Keep only the first tokens of a leaf, where they are any and there is memory; return whether it was done."""
        assert leaf.slot is not None, "no root"
        num_tokens = self._last_place(up_from(leaf), leaf.begin + num_tokens) - leaf.begin
        if num_tokens <= 0:
            return False
        before = leaf.nbytes
        try:
            parts = parts_between(leaf, leaf.begin, leaf.begin + num_tokens)
            slot = leaf.slot.give_up(0, num_tokens)  # layer by layer: where memory is scarce, hardly more is taken
        except RuntimeError:
            self.num_bytes -= before - leaf.nbytes  # layers that are gone; the rest follows
            return False
        self.num_tokens -= len(leaf.tokens) - num_tokens
        self.num_bytes -= before
        leaf.slot, leaf.parts, leaf.tokens = slot, parts, leaf.tokens[:num_tokens]
        self.num_bytes += leaf.nbytes
        return True

    def _use(self, node: Node | None) -> None:
        """Note the use of a node and of those before it."""
        while node is not None and node.parent is not None:
            self._by_use[node] = None
            self._by_use.move_to_end(node)
            node.used_s = time.monotonic()
            node = node.parent


def num_common(one: list[int], other: list[int]) -> int:
    """Count the equal tokens at the beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
