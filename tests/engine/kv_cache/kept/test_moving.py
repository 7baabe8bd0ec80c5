"""What is kept of a beginning moves into its sequence's slot: against a model of tokens, and in hardly more memory."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helpers.alive_tensors import Alive
from helpers.small_slots import LAYOUT, TINY, TINY_POSITION, has_names, name_of, write_names
from moeflow.engine.kv_cache.kv_format import FORMATS
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.kv_cache.windows import first_needed
from moeflow.engine.scheduler import Scheduler
from moeflow.engine.sequence import MIN_SHARED_TOKENS, Sequence

WINDOW = 3
WINDOWED = {**TINY, 1: TINY[0]._replace(window=WINDOW)}
PASS = 32  # tokens


class Conversations(RuleBasedStateMachine):
    """Conversations that begin, go on, branch and end, and what must be left of each."""

    layout = TINY
    positions = 100_000

    def __init__(self):
        super().__init__()
        most_new = PASS if len(self.layout) > 1 else None
        position = sum(shape.position_bytes for shape in self.layout.values())
        self.memory = KeyValueMemory(self.layout, self.positions * position, most_new=most_new)
        self.scheduler = Scheduler(4, PASS)
        self.known = []  # all that was ever computed to its end
        self.ended = []  # what must still be there, where there is room for all
        self.number = 0

    @property
    def running(self):
        return self.scheduler.running

    @precondition(lambda self: len(self.running) + len(self.scheduler.waiting) < 4)
    @rule(data=st.data(), new=st.text("abc", min_size=1, max_size=30), times=st.integers(1, 5), cut=st.integers(0, 3))
    def ask(self, data, new, times, cut):
        before = data.draw(st.sampled_from(self.known)) if self.known and cut else []
        before = before[: len(before) - (cut - 1) * 5]
        self.number += 1
        self.scheduler.add(Sequence(str(self.number), [*before, *new * times], data.draw(st.integers(1, 80))))

    @rule(answers=st.text("abc", min_size=1, max_size=12))
    def steps(self, answers):
        for answer in answers:
            self.step(answer)

    def step(self, answer):
        for piece in self.scheduler.plan(self.memory):
            one = piece.sequence
            slot, all_tokens = self.memory[one.id], one.tokens_from(0)
            self.has_all(one)
            for layer in self.layout:
                names = [float(name_of(None, all_tokens[: place + 1])) for place in range(one.length)]
                row = torch.tensor(names[one.num_computed : one.num_computed + len(piece.tokens)], dtype=torch.float64)
                slot.write(layer, one.num_computed, row[None, None, :, None], -row[None, None, :, None])
            one.num_computed += len(piece.tokens)
            if piece.samples and one.length < one.num_positions:
                one.append(answer)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data, fails):
        one = data.draw(st.sampled_from(self.running))
        self.scheduler.remove(one)
        computed = one.tokens_from(0)[: one.num_computed]
        if fails:
            self.memory.free(one)
            lost = [kept for kept in self.ended if kept == computed[: len(kept)]]
            self.ended = [kept for kept in self.ended if kept not in lost or self.is_there(kept)]
        else:
            self.memory.keep(one)
            if len(computed) >= MIN_SHARED_TOKENS:
                self.ended.append(computed)
                self.known.append(one.tokens_from(0))

    def has_all(self, one):
        """Check what a sequence has computed, or has from others."""
        slot, computed = self.memory[one.id], one.tokens_from(0)[: one.num_computed]
        assert has_names(slot, None, computed)
        for layer in range(1, len(self.layout)):
            begin = first_needed(len(computed), WINDOW)
            found = slot.read(layer, len(computed))[0].flatten().tolist()[begin:]
            names = [float(name_of(None, computed[: place + 1])) for place in range(begin, len(computed))]
            assert found == names, "the window is another's"

    def is_there(self, tokens):
        """Whether another sequence can go on behind these tokens."""
        donors = (one for one in self.running if one.tokens_from(0)[: one.num_computed][: len(tokens)] == tokens)
        if any(self.memory.num_reached(one, len(tokens)) == len(tokens) for one in donors):
            return True
        return self.memory.kept.longest(None, tokens) == len(tokens)

    @invariant()
    def all_is_counted_and_right(self):
        self.memory.check_integrity()
        self.scheduler.check_integrity({*self.running, *self.scheduler.waiting}, self.memory)
        for one in self.running:
            self.has_all(one)
        for _, path in self.memory.kept.sequences():
            tokens = [token for node in path for token in node.tokens]
            for node in path:
                values = node.slot.keys[0].flatten().tolist()
                places = range(node.begin, node.end)
                assert values == [float(name_of(None, tokens[: place + 1])) for place in places]

    @invariant()
    def nothing_is_lost(self):
        assert self.positions < 1000 or all(map(self.is_there, self.ended))


class Windowed(Conversations):
    layout = WINDOWED


class Crowded(Conversations):
    layout = WINDOWED
    positions = 150


TestPlain, TestWindowed, TestCrowded = Conversations.TestCase, Windowed.TestCase, Crowded.TestCase
TestPlain.settings = TestWindowed.settings = TestCrowded.settings = settings(
    max_examples=6, stateful_step_count=25, deadline=None
)


def ended(memory, tokens):
    """Let a sequence end, of which any bits are kept."""
    one = Sequence("ended", tokens, 1)
    assert memory.admit(one)
    for tensor in tensors_of(memory["ended"]):
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    one.num_computed = len(tokens)
    memory.keep(one)


def tensors_of(slot):
    return [*slot.keys.values(), *slot.values.values()]


@pytest.mark.parametrize("form", [None, "int8"])
def test_no_more_than_one_layer_lies_twice_and_every_bit_moves(form):
    layout = {number: LAYOUT[0]._replace(key=(2, 16), value=(2, 16), form=FORMATS.get(form)) for number in range(8)}
    position = layout[0].position_bytes
    memory = KeyValueMemory(layout, 8 * 200 * position)
    ended(memory, list(range(100)))
    before = [tensor.clone() for tensor in tensors_of(memory.kept.oldest.slot)]
    one = Sequence("next", list(range(120)), 1)
    with Alive(tensors_of(memory.kept.oldest.slot)) as alive:
        assert alive.now == 8 * 100 * position
        assert memory.admit(one)
    assert alive.now == memory["next"].nbytes == 8 * 120 * position
    assert alive.most <= (8 * 120 + 100) * position
    assert (one.num_computed, memory.kept_bytes) == (100, 0)
    for moved, kept in zip(tensors_of(memory["next"]), before, strict=True):
        assert torch.equal(moved[:, :, :100], kept)
    memory.check_integrity()


def test_a_beginning_and_its_next_turn_fit_where_both_together_would_not():
    memory = KeyValueMemory(TINY, 120 * TINY_POSITION)
    ended(memory, list(range(100)))
    one = Sequence("next", list(range(120)), 1)
    assert memory.admit(one)
    assert (one.num_computed, memory.peak_bytes) == (100, 120 * TINY_POSITION)


def test_what_others_branch_from_is_copied_and_stays():
    memory = KeyValueMemory(TINY, 1000 * TINY_POSITION)
    for end in (7, 8):
        ended_name = Sequence(str(end), [*range(40), *[end] * 20], 1)
        assert memory.admit(ended_name)
        write_names(memory[str(end)], None, ended_name.prompt_ids)
        ended_name.num_computed = 60
        memory.keep(ended_name)
    one = Sequence("one", [*range(40), *[7] * 20, 5], 1)
    assert memory.admit(one)
    assert one.num_computed == 60
    assert has_names(memory["one"], None, [*range(40), *[7] * 20])
    assert memory.kept.common(None, [*range(40), *[8] * 20]) == 60
    assert memory.kept.num_tokens == 60
    same = Sequence("same", [*range(40), 9], 1)
    assert memory.admit(same)
    assert (same.num_computed, memory.num_kept(same)) == (0, 40)


def test_a_window_comes_from_all_runs_that_it_lies_in():
    one = Windowed()
    for prompt in (range(40), [*range(40), 7], [*range(40), 8], [*range(40), 7, 9]):
        one.scheduler.add(last := Sequence("one", list(prompt), 2))
        while not last.token_ids:
            one.step(3)
        if len(prompt) < 42:
            last.token_ids.clear()
            one.scheduler.remove(last)
            one.memory.keep(last)
    assert last.num_cached == 41
    one.has_all(last)


def test_where_the_machine_has_no_memory_midway_tree_and_slot_are_whole(monkeypatch):
    layout = dict.fromkeys(range(4), TINY[0])
    memory = KeyValueMemory(layout, 4 * 1000 * TINY_POSITION)
    ended(memory, list(range(50)))
    behind = KeyValueSlot.behind.__func__

    def without_memory(cls, layout, num_positions, runs):
        if runs:
            behind(cls, dict(list(layout.items())[:2]), num_positions, runs)  # two layers have left
            raise RuntimeError("the machine has no memory")
        return behind(cls, layout, num_positions, runs)

    monkeypatch.setattr(KeyValueSlot, "behind", classmethod(without_memory))
    one = Sequence("next", list(range(60)), 1)
    assert memory.admit(one)
    assert (one.num_computed, memory.kept_bytes, memory.num_kept(one)) == (0, 0, 0)
    memory.check_integrity()
