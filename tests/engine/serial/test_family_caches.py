"""Caches of ended sequences: inside their budget, the oldest goes first, and used where that takes less time."""

import torch

from moeflow.engine.sequence import Sequence
from moeflow.engine.serial.family_caches import FamilyCaches
from moeflow.hf.passes.generating.generate_step import cache_bytes

ONE = 4 * 10  # bytes of a cache


def ended(memory, *token_ids, cache=None):
    """Let a sequence run and end; what it leaves has 10 floats."""
    sequence = Sequence("one", list(token_ids), 1)
    memory.admit(sequence)
    own = memory[sequence.id]
    own.cache, own.num_positions = cache or [torch.zeros(10)], len(token_ids)
    memory.keep(sequence)


def usable(memory, *token_ids):
    return memory.num_kept(Sequence("other", list(token_ids), 1))


def test_what_was_not_used_for_the_longest_time_goes_first():
    memory = FamilyCaches(2 * ONE, lambda cache: True)
    ended(memory, 1, 2)
    ended(memory, 3, 4)
    again = Sequence("again", [1, 2, 5], 1)
    memory.admit(again)
    memory.share(None, again, 2)
    memory.keep(again)
    ended(memory, 6, 7)
    assert (usable(memory, 1, 2, 9), usable(memory, 3, 4, 9), usable(memory, 6, 7, 9)) == (2, 0, 2)
    assert memory.kept_bytes == 2 * ONE
    memory.check_integrity()


def test_the_longest_that_covers_no_other_token_is_used_and_the_last_token_is_always_computed():
    memory = FamilyCaches(9 * ONE, lambda cache: True)
    ended(memory, 1, 2)
    ended(memory, 1, 2, 3)
    assert (usable(memory, 1, 2, 3, 4), usable(memory, 1, 2, 3), usable(memory, 1, 2, 5)) == (3, 2, 2)
    assert usable(memory, 1, 5, 6) == 0


def test_nothing_is_kept_beyond_the_budget_nor_of_what_does_not_last():
    memory = FamilyCaches(ONE - 1, lambda cache: True)
    ended(memory, 1, 2)
    unlasting = FamilyCaches(ONE, lambda cache: False)
    ended(unlasting, 1, 2)
    assert memory.kept_bytes == unlasting.kept_bytes == 0


def test_steps_of_one_token_are_weighed_against_a_whole_prompt():
    memory = FamilyCaches(ONE, lambda cache: True)
    ended(memory, 1, 2)
    memory.step_s, memory.prefill_s = 1.0, 0.25
    assert usable(memory, 1, 2, 3, 4) == 2, "not known to need steps of one token"
    memory.several = False
    assert usable(memory, 1, 2, 3, 4) == 0
    memory.step_s = 0.5
    assert usable(memory, 1, 2, 3, 4) == 2


def test_memory_that_tensors_share_counts_once():
    whole = torch.zeros(100)
    assert cache_bytes({"keys": whole[:10], "values": [whole[10:], (whole, None)]}) == 400
