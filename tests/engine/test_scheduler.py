"""The scheduler alone: who runs, waits and gives way, in pieces of which size, and which beginnings are shared."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.engine.scheduler import STEPS_PER_PRIORITY, Scheduler, check_priority
from moeflow.engine.sequence import Piece, Sequence
from moeflow.errors import ConfigError, QueueFullError

LONG = list(range(100, 140))


def run(pieces, memory=None):
    """Enter what a step computed, as the engine does, with token 7 as every answer."""
    ended = []
    for sequence, tokens, samples, _ in pieces:
        sequence.num_computed += len(tokens)
        if memory is not None:
            memory.have[sequence] += tokens
        if samples:
            sequence.token_ids.append(7)
        if len(sequence.token_ids) == sequence.max_new_tokens:
            ended.append(sequence)
    return ended


class Positions:
    """Room for so many positions, of which each sequence takes exactly those of its tokens.

    Attributes:
        have: the tokens that each running sequence has.
        shared: (donor, receiver, number of tokens) of each copy; None for what is kept.
        gone: sequences that gave way.
    """

    def __init__(self, num_positions=10**9, kept=(), admits=lambda sequence: True):
        self.num_positions = num_positions
        self.kept = list(kept)
        self.admits = admits
        self.have, self.room, self.shared, self.gone = {}, {}, [], []

    def admit(self, sequence):
        assert sequence not in self.room
        if not self.admits(sequence) or sum(self.room.values()) + sequence.length > self.num_positions:
            return False
        self.room[sequence], self.have[sequence] = sequence.length, []
        return True

    def grow(self, sequence):
        needed = sequence.length - self.room[sequence]
        if sum(self.room.values()) + needed > self.num_positions:
            return False
        self.room[sequence] += needed
        return True

    def preempt(self, sequence, grower):
        assert grower in self.room
        self.free(sequence)
        self.gone.append(sequence)

    def free(self, sequence):
        del self.room[sequence], self.have[sequence]

    def num_kept(self, sequence):
        matching = [len(one) for one in self.kept if sequence.prompt_ids[: len(one)] == one]
        return max(matching, default=0)

    def num_reached(self, donor, num_tokens):
        return num_tokens

    def expect(self, donor, num_tokens):
        assert num_tokens > len(self.have[donor])

    def share(self, donor, receiver, num_tokens):
        assert not self.have[receiver]
        self.shared.append((donor, receiver, num_tokens))
        source = receiver.prompt_ids if donor is None else self.have[donor]
        assert len(source) >= num_tokens
        self.have[receiver] += source[:num_tokens]


def test_prompts_come_in_pieces_behind_the_tokens_of_those_that_decode():
    scheduler, memory = Scheduler(4, 10, share_prefixes=False), Positions()
    first, second = Sequence("first", list(range(4)), 9), Sequence("second", list(range(14)), 9)
    for sequence in (first, second):
        scheduler.add(sequence)
    plans = []
    for _ in range(3):
        plans.append(scheduler.plan(memory))
        run(plans[-1])
    assert plans == [
        [Piece(first, [0, 1, 2, 3], True), Piece(second, [0, 1, 2, 3, 4, 5], False)],
        [Piece(first, [7], True), Piece(second, [6, 7, 8, 9, 10, 11, 12, 13], True)],
        [Piece(first, [7], True), Piece(second, [7], True)],
    ]


def test_who_finds_no_room_lets_all_behind_wait():
    scheduler = Scheduler(4, 10)
    large, small = Sequence("large", [1, 2], 9), Sequence("small", [1], 1)
    scheduler.add(large)
    scheduler.add(small)
    assert scheduler.plan(Positions(admits=lambda sequence: sequence is small)) == []
    assert scheduler.waiting == [large, small]


def test_a_beginning_under_way_is_waited_for_and_then_shared():
    scheduler, memory = Scheduler(4, 64), Positions()
    first, second, other = (
        Sequence("first", [*LONG, 1], 9),
        Sequence("second", [*LONG, 2], 9),
        Sequence("other", [5], 9),
    )
    for sequence in (first, second, other):
        scheduler.add(sequence)
    pieces = scheduler.plan(memory)
    assert [piece.sequence for piece in pieces] == [first, other]
    assert not memory.shared
    run(pieces, memory)
    pieces = scheduler.plan(memory)
    assert memory.shared == [(first, second, len(LONG))]
    assert Piece(second, [2], True) in pieces
    assert [one.num_cached for one in (first, second, other)] == [0, len(LONG), 0]


def test_a_beginning_of_a_few_tokens_is_not_waited_for():
    scheduler = Scheduler(4, 64)
    for id in ("first", "second"):
        scheduler.add(Sequence(id, [1, 2, 3], 9))
    assert len(scheduler.plan(Positions())) == 2


def test_of_several_beginnings_the_longest_is_shared_and_of_an_answer_under_way_nothing():
    scheduler, memory = Scheduler(4, 64), Positions()
    short, long = Sequence("short", LONG[:20], 9), Sequence("long", [*LONG[:30], 1], 9)
    for sequence in (short, long):
        scheduler.add(sequence)
    for _ in range(3):
        run(scheduler.plan(memory), memory)
    memory.shared.clear()
    for sequence in (Sequence("first", LONG, 9), Sequence("second", [*LONG[:20], 7, 7, 7], 9)):
        scheduler.add(sequence)
        scheduler.plan(memory)
        scheduler.remove(sequence)
        memory.free(sequence)
    assert [(donor.id, receiver.id, count) for donor, receiver, count in memory.shared] == [
        ("long", "first", 30),
        ("short", "second", 20),
    ]


@pytest.mark.parametrize(("kept", "donor"), [(20, "donor"), (30, None), (36, None)])
def test_of_what_is_kept_and_what_runs_the_longer_is_copied(kept, donor):
    scheduler, memory = Scheduler(4, 64), Positions()
    scheduler.add(Sequence("donor", [*LONG[:30], 1], 9))
    run(scheduler.plan(memory), memory)
    memory.kept.append(LONG[:kept])
    sequence = Sequence("receiver", LONG, 9)
    scheduler.add(sequence)
    pieces = scheduler.plan(memory)
    ((found, _, count),) = memory.shared
    assert (found and found.id, count) == (donor, max(kept, 30))
    assert Piece(sequence, LONG[count:], True) in pieces
    assert sequence.num_cached == count


def test_the_youngest_of_the_lowest_priority_gives_way_and_comes_back_before_all_that_wait():
    scheduler, memory = Scheduler(4, 64, share_prefixes=False), Positions(8)
    high, old, young = Sequence("high", [1, 1], 9, priority=1), Sequence("old", [2, 2], 9), Sequence("young", [3], 9)
    waits = Sequence("waits", [4], 9)
    for sequence in (young, high, old):
        sequence.max_new_tokens = 9
    for sequence in (old, high, young, waits):
        scheduler.add(sequence)
    assert scheduler.waiting == [high, old, young, waits]
    scheduler.max_batch_size = 3
    for _ in range(2):
        run(scheduler.plan(memory), memory)
    assert memory.gone == []
    run(scheduler.plan(memory), memory)  # 4 + 4 + 3 tokens
    assert memory.gone == [young]
    assert scheduler.waiting == [young, waits]
    assert (young.num_computed, young.token_ids) == (0, [7, 7])
    run(scheduler.plan(memory), memory)
    assert memory.gone == [young, old]
    assert scheduler.waiting == [old, young, waits]
    scheduler.remove(high)
    memory.free(high)
    assert scheduler.plan(memory) == [Piece(old, [2, 2, 7, 7, 7], True), Piece(young, [3, 7, 7], True)]


def test_who_came_later_with_a_higher_priority_does_not_give_way():
    scheduler, memory = Scheduler(4, 64, share_prefixes=False), Positions(5)
    low, high = Sequence("low", [1, 1], 9), Sequence("high", [2, 2], 9, priority=1)
    for sequence in (low, high):
        scheduler.add(sequence)
        run(scheduler.plan(memory), memory)
    scheduler.plan(memory)
    assert scheduler.running == [high]
    assert memory.gone == [low]


def test_priorities_are_whole_numbers_within_bounds():
    for priority in (0, -100, 100):
        check_priority(priority)
    for priority in (101, -101, 1.0, True, None, "high"):
        with pytest.raises(ConfigError, match=f"priority={priority!r}"):
            check_priority(priority)


def test_more_wait_than_may_be_only_where_there_is_no_limit():
    scheduler, memory = Scheduler(2, 64, max_waiting=1), Positions()
    for number in range(3):
        scheduler.check_place()
        scheduler.add(Sequence(str(number), [1], 9))
    for _ in range(2):
        with pytest.raises(QueueFullError, match="3 requests are under way, and max_waiting=1"):
            scheduler.check_place()
        scheduler.plan(memory)
    scheduler.remove(scheduler.running[0])
    scheduler.check_place()
    for number in (-1, 1.5, True):
        with pytest.raises(ConfigError, match=f"max_waiting={number!r}"):
            Scheduler(2, 64, max_waiting=number)


@settings(max_examples=60, deadline=None)
@given(
    priority=st.integers(-3, 3),
    before=st.lists(st.integers(-3, 3), max_size=5),
    rush=st.integers(-3, 3),
    later=st.lists(st.tuples(st.integers(0, 650), st.integers(-3, 3)), max_size=20),
)
def test_no_sequence_starves_for_only_who_came_soon_enough_for_its_priority_goes_before_it(
    priority, before, rush, later
):
    """One sequence runs and ends in each step, and one of priority `rush` comes, so the queue never gets shorter."""
    scheduler, memory = Scheduler(1, 1), Positions()

    def add(priority):
        sequence = Sequence(str(priority), [1], 1, priority=priority)
        scheduler.add(sequence)
        return sequence

    for one in before:
        add(one)
    waits, ahead = add(priority), sum(one >= priority for one in before)
    for step in range(len(before) + STEPS_PER_PRIORITY * 6 + len(later) + 1):
        (sequence,) = run(scheduler.plan(memory), memory)
        scheduler.remove(sequence)
        memory.free(sequence)
        if sequence is waits:
            assert step <= ahead
            return
        for one in (rush, *(one for when, one in later if when == step)):
            ahead += step + 1 < STEPS_PER_PRIORITY * (one - priority)
            add(one)
    raise AssertionError("it starves")


PROMPT = st.builds(
    lambda shared, own: LONG[:shared] + own, st.integers(0, 40), st.lists(st.integers(0, 3), min_size=1, max_size=6)
)
KEPT = st.lists(st.integers(16, 40).map(lambda count: LONG[:count]), max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 5), st.integers(-2, 2)), min_size=1, max_size=12),
    max_batch_size=st.integers(1, 4),
    spare=st.integers(0, 20),
    share=st.booleans(),
    kept=KEPT,
    room=st.integers(0, 60),
)
def test_every_token_is_computed_or_copied_once_and_all_end_whoever_gives_way(
    prompts, max_batch_size, spare, share, kept, room
):
    scheduler = Scheduler(max_batch_size, max_batch_size + spare, share_prefixes=share)
    sequences = [Sequence(str(place), *one[:2], priority=one[2]) for place, one in enumerate(prompts)]
    memory = Positions(room + max(one.num_positions for one in sequences), kept)
    for sequence in sequences:
        scheduler.add(sequence)
    left, steps = len(sequences), 0
    while left:
        pieces = scheduler.plan(memory)
        steps += 1
        assert steps < 5000, "a sequence never ends"
        assert pieces, "a step without work, and not all have ended"
        assert sum(len(piece.tokens) for piece in pieces) <= scheduler.max_step_tokens
        assert len({piece.sequence for piece in pieces}) == len(pieces) <= len(scheduler.running) <= max_batch_size
        assert all(piece.tokens for piece in pieces)
        assert {sequence for sequence in scheduler.running if sequence.decoding} <= {piece.sequence for piece in pieces}
        assert set(memory.room) == set(scheduler.running)
        for sequence, tokens, samples, _ in pieces:
            assert (
                memory.have[sequence] + tokens
                == (sequence.prompt_ids + sequence.token_ids)[: sequence.num_computed + len(tokens)]
            )
            assert samples == (sequence.num_computed + len(tokens) == sequence.length)
        for sequence in run(pieces, memory):
            assert memory.have[sequence] == sequence.prompt_ids + sequence.token_ids[:-1]
            assert len(memory.have[sequence]) == sequence.num_positions
            assert scheduler.remove(sequence)
            memory.free(sequence)
            left -= 1
    assert not scheduler.running
    assert not scheduler.waiting
    assert share or not memory.shared
