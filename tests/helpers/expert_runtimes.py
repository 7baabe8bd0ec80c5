"""Runtimes over a small file of known experts, and stand-ins for the streams of a GPU."""

import itertools
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import LayerLayout, RecordLayout
from moeflow.offload.host_tier import HostTier
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import HostStreams
from moeflow.policy.cache import ExpertCache
from moeflow.policy.miss_split import MissSplit

NUM_LAYERS, NUM_EXPERTS, SIZE = 3, 6, 1000


class Layout(NamedTuple):
    """Of a file of experts: where the first begins, and how many float32 each has."""

    begin: int
    size: int


SHORT = Layout(3, SIZE)  # at no page: read through a buffer
PAGES = Layout(4096, 3072)  # three pages each, read in place
ODD_PAGES = Layout(3, 3072)
DEMANDS = st.lists(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1)), max_size=25
)


def write_experts(path, layout=SHORT):
    """Write the file; return it and the values [NUM_LAYERS, NUM_EXPERTS, size], float32."""
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS, NUM_EXPERTS, layout.size)).astype(np.float32)
    path.write_bytes(b"." * layout.begin + values.tobytes())
    return path, torch.from_numpy(values)


class ThreadStreams:
    """Copies in a thread of their own, as a GPU's copy engine does: a missing wait shows as wrong bytes."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)

    def copy(self, target, source, after, **options):
        event = threading.Event()

        def work():
            if after is not None:
                after.wait()
            target.zero_()
            target.copy_(source)
            event.set()

        self._thread.submit(work)
        return event

    def bring_down(self, target, source):
        return self.copy(target, source, None)

    def compute_event(self):
        return None

    def wait(self, event):
        if event is not None:
            event.wait()

    def synchronize(self, event):
        self.wait(event)

    def done(self, event):
        return event is None or event.is_set()

    def copy_s(self, event):
        return 1e-6

    def finish(self):
        self._thread.submit(int).result()


class GivenSplit(MissSplit):
    """Decides by a list, over and over, instead of by bandwidths."""

    def __init__(self, *numbers):
        super().__init__()
        self.most_tokens = 0
        self._numbers = itertools.cycle(numbers)

    def split(self, num_tokens, num_bytes, num_ahead=0):
        assert list(num_tokens) == sorted(num_tokens)
        self.most_tokens = max(num_tokens, default=0)
        return min(next(self._numbers), len(num_tokens))


def build(
    path, num_slots, policy="lfru", host_slots=0, streams=None, misses=None, host_pool=None, *,
    store_class=ExpertStore, predicting=None, layout=SHORT, pool_class=SlotPool, governor=None,
    sampling=None,
):  # fmt: skip
    """Build a runtime; `streams` and `governor` are made from the pool, `predicting` makes a loop from the cache.

    `sampling` makes a sampler from the store, the pool, the cache and the streams.
    """
    size = layout.size
    record = RecordLayout.pack([("w", "F32", (size,))])
    layers = []
    for layer in range(NUM_LAYERS):
        numbers = [layer * NUM_EXPERTS + expert for expert in range(NUM_EXPERTS)]
        begins = array("Q", [layout.begin + 4 * size * number for number in numbers])
        table = PieceTable("F32", (size,), 4 * size, array("H", [0]) * NUM_EXPERTS, begins)
        layers.append(LayerSource(LayerLayout(f"layers.{layer}", NUM_EXPERTS, record), ((table, 0),), ()))
    cpu = torch.device("cpu")
    host = None
    if host_slots:
        host_pool = host_pool or SlotPool(host_slots, record.num_bytes, cpu)
        host = HostTier(host_pool, ExpertCache(host_slots, policy))
    pool, cache = pool_class(num_slots, record.num_bytes, cpu), ExpertCache(num_slots, policy)
    cache.close(pool.closed_slots())
    store = store_class([path], layers)
    streams = streams(pool) if callable(streams) else streams or HostStreams()
    prediction = None if predicting is None else predicting(cache)
    return ExpertRuntime(
        store, pool, cache, streams, host=host, num_threads=2, prediction=prediction, misses=misses,
        governor=governor and governor(pool), sampler=sampling and sampling(store, pool, cache, streams),
    )  # fmt: skip


def each(fetched):
    """Flatten what is fetched into (expert, weights)."""
    for batch in fetched:
        yield from ((resident.expert, resident.tensors()) for resident in batch)


def fetch(runtime, layer, experts, values):
    """Demand experts and compare what is fetched with the file."""
    seen = []
    with closing(runtime.fetch(layer, experts)) as fetched:
        for expert, weights in each(fetched):
            assert torch.equal(weights["w"], values[layer, expert]), f"expert {expert} of layer {layer} is wrong"
            seen.append(expert)
    assert sorted(seen) == sorted(experts)


def empty_device(runtime):
    """Let every copy end, and leave no expert on the device."""
    runtime._residency.settle_all()
    runtime.check_integrity()
    runtime.cache.clear()


def fill_host(runtime, values):
    """Bring every expert into a host tier that holds them all, and leave none on the device."""
    for layer in range(NUM_LAYERS):
        fetch(runtime, layer, list(range(NUM_EXPERTS)), values)
    empty_device(runtime)
    runtime.reset_stats()
