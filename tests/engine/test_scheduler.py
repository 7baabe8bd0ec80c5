"""The scheduler alone: which sequences run, in pieces of which size, and which beginnings are shared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.engine.scheduler import Scheduler
from moeflow.engine.sequence import Piece, Sequence

LONG = list(range(100, 140))


def never_share(donor, receiver, num_tokens):
    raise AssertionError(f"{receiver.id} shares {num_tokens} tokens of {donor.id}")


def run(pieces):
    """Enter what a step computed, as the engine does, with token 7 as every answer."""
    ended = []
    for sequence, tokens, samples in pieces:
        sequence.num_computed += len(tokens)
        if samples:
            sequence.token_ids.append(7)
        if len(sequence.token_ids) == sequence.max_new_tokens:
            ended.append(sequence)
    return ended


def test_prompts_come_in_pieces_behind_the_tokens_of_those_that_decode():
    scheduler = Scheduler(4, 10, share_prefixes=False)
    first, second = Sequence("first", list(range(4)), 9), Sequence("second", list(range(14)), 9)
    for sequence in (first, second):
        scheduler.add(sequence)
    plans = []
    for _ in range(3):
        plans.append(scheduler.plan(lambda sequence: True, never_share))
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
    assert scheduler.plan(lambda sequence: sequence is small, never_share) == []
    assert list(scheduler.waiting) == [large, small]


def test_a_beginning_under_way_is_waited_for_and_then_shared():
    scheduler = Scheduler(4, 64)
    first, second, other = (
        Sequence("first", [*LONG, 1], 9),
        Sequence("second", [*LONG, 2], 9),
        Sequence("other", [5], 9),
    )
    for sequence in (first, second, other):
        scheduler.add(sequence)
    shared = []
    pieces = scheduler.plan(lambda sequence: True, never_share)
    assert [piece.sequence for piece in pieces] == [first, other]
    run(pieces)
    pieces = scheduler.plan(lambda sequence: True, lambda *sharing: shared.append(sharing))
    assert shared == [(first, second, len(LONG))]
    assert Piece(second, [2], True) in pieces


def test_a_beginning_of_a_few_tokens_is_not_waited_for():
    scheduler = Scheduler(4, 64)
    for id in ("first", "second"):
        scheduler.add(Sequence(id, [1, 2, 3], 9))
    assert len(scheduler.plan(lambda sequence: True, never_share)) == 2


def test_of_several_beginnings_the_longest_is_shared_and_of_an_answer_nothing():
    scheduler = Scheduler(4, 64)
    short, long = Sequence("short", LONG[:20], 9), Sequence("long", [*LONG[:30], 1], 9)
    for sequence in (short, long):
        scheduler.add(sequence)
    for _ in range(3):
        run(scheduler.plan(lambda sequence: True, lambda *sharing: None))
    shared = []
    for sequence in (Sequence("first", LONG, 9), Sequence("second", [*LONG[:20], 7, 7, 7], 9)):
        scheduler.add(sequence)
        scheduler.plan(lambda sequence: True, lambda *sharing: shared.append(sharing))
        scheduler.remove(sequence)
    assert [(donor.id, receiver.id, count) for donor, receiver, count in shared] == [
        ("long", "first", 30),
        ("short", "second", 20),
    ]


PROMPT = st.builds(
    lambda shared, own: LONG[:shared] + own, st.integers(0, 40), st.lists(st.integers(0, 3), min_size=1, max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 5)), min_size=1, max_size=12),
    max_batch_size=st.integers(1, 4),
    spare=st.integers(0, 20),
    share=st.booleans(),
)
def test_every_token_of_every_prompt_is_computed_or_shared_once_and_all_end(prompts, max_batch_size, spare, share):
    scheduler = Scheduler(max_batch_size, max_batch_size + spare, share_prefixes=share)
    have = {}  # the tokens whose keys and values each sequence has

    def take_over(donor, receiver, num_tokens):
        assert not have[receiver]
        assert len(have[donor]) >= num_tokens
        have[receiver] += have[donor][:num_tokens]

    sequences = [Sequence(str(place), prompt, most) for place, (prompt, most) in enumerate(prompts)]
    for sequence in sequences:
        have[sequence] = []
        scheduler.add(sequence)
    left = len(sequences)
    while left:
        pieces = scheduler.plan(lambda sequence: True, take_over)
        assert pieces, "a step without work, and not all have ended"
        assert sum(len(piece.tokens) for piece in pieces) <= scheduler.max_step_tokens
        assert len({piece.sequence for piece in pieces}) == len(pieces) <= len(scheduler.running) <= max_batch_size
        assert all(piece.tokens for piece in pieces)
        assert {sequence for sequence in scheduler.running if sequence.decoding} <= {piece.sequence for piece in pieces}
        for sequence, tokens, samples in pieces:
            have[sequence] += tokens
            assert samples == (len(have[sequence]) >= len(sequence.prompt_ids))
        for sequence in run(pieces):
            assert have[sequence] == sequence.prompt_ids + sequence.token_ids[:-1]
            assert len(have[sequence]) == sequence.num_positions
            assert scheduler.remove(sequence)
            left -= 1
    assert not scheduler.running
    assert not scheduler.waiting
