"""Room in a budget that experts share: what is allocated is held before, at every moment."""

import pytest
import torch

from helpers.alive_tensors import Alive
from helpers.engine_requests import tokens
from moeflow import load_moe
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.policies.sinks import Sinks
from moeflow.engine.sequence import Sequence
from moeflow.errors import BudgetError
from moeflow.policy.key_value_policies import SinksOptions


def test_what_a_window_sets_aside_is_held_before_it_is_copied(mixtral_folder):
    shape = LayerShape((1, 4), (1, 4), torch.float32, torch.device("cpu"))
    layout = {0: shape, **{number: shape._replace(window=8) for number in range(1, 9)}}
    with load_moe(mixtral_folder, memory=1 << 21, predictor=None).moeflow as runtime:
        num_aside = 0
        for most in range(75, 100, 4):  # the last window is small where the end is near
            share = runtime.governor.share(runtime)
            memory = KeyValueMemory(layout, 1 << 20, most_new=16, share=share)
            one = Sequence("one", tokens(48), most)
            with Alive(share=share) as alive:
                assert memory.admit(one)
                while one.length < one.num_positions:
                    assert memory.grow(one)
                    one.num_computed = min(one.length, one.num_computed + 16)
                    if one.num_computed == one.length:
                        one.append(5)
                num_aside += len(memory["one"].aside)
            assert alive.most_beyond <= 0
        assert num_aside


def test_a_sequence_that_forgets_is_as_large_as_the_rows_that_it_has(mixtral_folder):
    shape = LayerShape((1, 4), (1, 4), torch.float32, torch.device("cpu"))
    with load_moe(mixtral_folder, memory=1 << 21, predictor=None).moeflow as runtime:
        share = runtime.governor.share(runtime)
        rows = 4 + 28 + 64 + 16  # sinks, window, those that are let go together, a pass
        largest = rows * (shape.position_bytes + shape.copied_bytes)
        for num_bytes, policy in (
            (largest, Sinks(SinksOptions(4, 28))),
            (largest, None),
            (largest - 1, Sinks(SinksOptions(4, 28))),
        ):
            memory = KeyValueMemory({0: shape}, num_bytes, most_new=16, share=share, policy=policy)
            if policy is not None and num_bytes == largest:
                memory.check_possible(10**6)
            else:
                with pytest.raises(BudgetError):
                    memory.check_possible(10**6)


def test_bytes_are_told_of_only_once_nobody_copies_what_had_them(mixtral_folder):
    shape = LayerShape((1, 4), (1, 4), torch.float32, torch.device("cpu"))
    with load_moe(mixtral_folder, memory=1 << 21, predictor=None).moeflow as runtime:
        share, seen = runtime.governor.share(runtime), []

        class Copying:
            """Notes what the share has whenever it is asked whether somebody copies."""

            def __enter__(self):
                seen.append(share.num_bytes)

            def __exit__(self, *exc_info):
                pass

        memory = KeyValueMemory({0: shape}, 1 << 20, most_new=16, share=share)
        one = Sequence("one", tokens(48), 60)
        assert memory.admit(one)
        one.num_computed = 48
        memory.keep(one)
        memory._room.copying, held = Copying(), share.num_bytes
        assert held > 0
        memory.clear()
        assert (seen, share.num_bytes) == ([held], 0)
        assert memory._room.hold(100)
        assert (seen, share.num_bytes) == ([held, 0], 100)
