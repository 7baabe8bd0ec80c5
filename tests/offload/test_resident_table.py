"""The table of residents says after each refresh where every resident expert lies, and 0 of all others."""

import random

import numpy as np
import torch

from moeflow.core import ExpertKey
from moeflow.offload.resident_table import ResidentTable
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.stats import Stats
from moeflow.policy.cache import ExpertCache

SIZES = [5, 3, 4]  # experts of each layer


def test_the_table_is_the_residency_map_after_any_moves():
    cache, pool = ExpertCache(4, "lru"), SlotPool(4, 100, torch.device("cpu"))
    table, drawn, loading = ResidentTable(cache, pool, Stats(), SIZES), random.Random(0), set()
    place = table.addresses.ctypes.data
    seen = set()
    for _ in range(600):
        key = ExpertKey(layer := drawn.randrange(3), drawn.randrange(SIZES[layer]))
        move = drawn.choice(["demand", "demand", "demand", "arrive", "arrive", "fail", "limit", "clear"])
        if move == "demand" and key not in cache.slots and cache.reserve(key) is not None:
            cache.touch([key])
            loading.add(key)
        elif move == "arrive" and loading:
            cache.commit(arrived := loading.pop())
            cache.unpin(arrived)
        elif move == "fail" and loading:
            cache.abort(loading.pop())
        elif move == "limit":
            cache.set_limit(drawn.randint(1, 4))
        elif move == "clear" and not drawn.randrange(9):
            cache.clear()
            loading.clear()
        else:
            continue
        seen.add(move)
        if drawn.randrange(3):
            continue  # several moves between two refreshes
        table.refresh()
        expected = np.zeros((3, 5), np.int64)
        for resident in cache.resident():
            expected[resident] = pool.address + cache.slot(resident) * pool.stride
        np.testing.assert_array_equal(table.addresses, expected)
        assert not cache.moved
    assert len(seen) == 5
    assert table.addresses.ctypes.data == place
    pool.close()
