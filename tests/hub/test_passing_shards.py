"""How much room shards take that come and go, against a disk that is played turn by turn.

What comes and goes is tested with what is written of it: convert/test_download_quantized.py.
"""

import random

import pytest

from moeflow.hub.passing_shards import most_held


def played(turns, sizes, there, ahead):
    """Bytes on the disk after each thing that happens to it; the most of them."""
    disk = {number: num_bytes for number, num_bytes in enumerate(there) if num_bytes}
    most = sum(disk.values())
    for turn, needed in enumerate(turns):
        coming = needed | (turns[turn + 1] if ahead and turn + 1 < len(turns) else set())
        disk.update({number: sizes[number] for number in coming})
        most = max(most, sum(disk.values()))
        for number in needed - set().union(*turns[turn + 1 :]):
            del disk[number]
    assert not disk
    return most


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_the_most_is_that_of_a_disk_that_is_played(ahead, seed):
    draw = random.Random(seed)
    count = draw.randrange(1, 8)
    sizes = [draw.randrange(1, 100) for _ in range(count)]
    turns = [frozenset(draw.sample(range(count), draw.randrange(1, count + 1))) for _ in range(draw.randrange(1, 6))]
    needed = frozenset().union(*turns)
    there = [draw.choice([0, draw.randrange(size), size]) if n in needed else 0 for n, size in enumerate(sizes)]
    assert most_held(turns, sizes, there, one_ahead=ahead) == played(turns, sizes, there, ahead)


def test_shards_in_order_take_two_at_once_and_without_one_ahead_one():
    turns = [frozenset([number]) for number in range(9)]
    assert most_held(turns, [5] * 9, [0] * 9, one_ahead=True) == 10
    assert most_held(turns, [5] * 9, [0] * 9, one_ahead=False) == 5
    assert most_held([], [5] * 9, [0] * 9, one_ahead=True) == 0
