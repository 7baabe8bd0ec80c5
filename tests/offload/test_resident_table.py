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


def test_counting_layers_together_is_counting_each():
    drawn = np.random.default_rng(0)
    one_token = [drawn.permutation(8)[None, :3] for _ in range(4)]
    for layers, experts in [
        ([0, 2, 1, 3], one_token),
        ([0, 2, 0, 3], one_token),  # a layer twice
        ([0, 1], [np.array([[5, 2, 5]]), np.array([[1, 2, 3]])]),  # an expert twice
        ([0, 1], [np.array([[5, 2]]), np.array([[1, 2, 3]])]),
        ([0, 1], [np.array([[5, 2], [2, 7]]), np.array([[1, 2], [1, 2]])]),
    ]:
        found = []
        for together in (True, False):
            cache, pool, stats = ExpertCache(4, "lru"), SlotPool(4, 100, torch.device("cpu")), Stats()
            table = ResidentTable(cache, pool, stats, [8] * 4)
            for _ in range(2):
                if together:
                    table.count(layers, experts, 1.5)
                else:
                    for layer, own in zip(layers, experts, strict=True):
                        table.count_layer(
                            layer,
                            list(dict.fromkeys(own.ravel().tolist()))
                            if len(own) == 1
                            else sorted(set(own.ravel().tolist())),
                            0,
                        )
                    stats.now.compute_s += 1.5
            found.append([cache._passes, cache._counts, cache._last_passes, cache._last_events, cache._event])
            found[-1] += [stats.now.hits, stats.now.decisions.layers_ready, stats.now.compute_s]
            pool.close()
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
