"""ExpertRuntime over real files: every served weight is the expert that was asked for, with and without a host tier."""

import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.cache import POLICIES, ExpertCache
from moeflow.core import ExpertKey, LayerLayout, RecordLayout
from moeflow.layers import LayerSource, PieceTable
from moeflow.pool import SlotPool
from moeflow.runtime import ExpertRuntime
from moeflow.store import ExpertStore
from moeflow.streams import HostStreams
from moeflow.transfer import HostTier

NUM_LAYERS, NUM_EXPERTS, SIZE = 3, 6, 1000


class ThreadStreams:
    """Copies in a thread of their own, as a GPU's copy engine does: a missing wait shows as wrong bytes."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)

    def copy(self, target, source, after):
        event = threading.Event()

        def work():
            if after is not None:
                after.wait()
            target.zero_()
            target.copy_(source)
            event.set()

        self._thread.submit(work)
        return event

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


@pytest.fixture(scope="module")
def experts_file(tmp_path_factory):
    """[NUM_LAYERS, NUM_EXPERTS, SIZE] float32, and the file they lie in at an odd offset."""
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS, NUM_EXPERTS, SIZE)).astype(np.float32)
    path = tmp_path_factory.mktemp("runtime") / "experts.bin"
    path.write_bytes(b"odd" + values.tobytes())
    return path, torch.from_numpy(values)


def build(path, num_slots, policy="lfru", host_slots=0, streams=None):
    record = RecordLayout.pack([("w", "F32", (SIZE,))])
    layers = []
    for layer in range(NUM_LAYERS):
        begins = array("Q", [3 + 4 * SIZE * (layer * NUM_EXPERTS + expert) for expert in range(NUM_EXPERTS)])
        table = PieceTable("F32", (SIZE,), 4 * SIZE, array("H", [0]) * NUM_EXPERTS, begins)
        layers.append(LayerSource(LayerLayout(f"layers.{layer}", NUM_EXPERTS, record), ((table, 0),), ()))
    cpu = torch.device("cpu")
    host = None
    if host_slots:
        host = HostTier(SlotPool(host_slots, record.num_bytes, cpu), ExpertCache(host_slots, policy))
    pool, cache = SlotPool(num_slots, record.num_bytes, cpu), ExpertCache(num_slots, policy)
    return ExpertRuntime(ExpertStore([path], layers), pool, cache, streams or HostStreams(), host=host, num_threads=2)


def serve(runtime, layer, experts, values):
    """Demand experts and compare what is served with the file."""
    seen = []
    with closing(runtime.serve(layer, experts)) as served:
        for expert, weights in served:
            assert torch.equal(weights["w"], values[layer, expert]), f"expert {expert} of layer {layer} is wrong"
            seen.append(expert)
    assert sorted(seen) == sorted(experts)


DEMANDS = st.lists(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1)), max_size=25
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 7), st.sampled_from([0, 4, 9]), st.booleans(), DEMANDS)
def test_any_demand_is_served_right(experts_file, policy, num_slots, host_slots, threads, demands):
    path, values = experts_file
    with build(path, num_slots, policy, host_slots, ThreadStreams() if threads else None) as runtime:
        runtime.begin_forward(1, 1, continues=True)
        for layer, experts in demands:
            serve(runtime, layer, sorted(experts), values)
            runtime.check_integrity()
        stats = runtime.stats()["decode"]
        assert stats["hits"] + stats["misses"] == sum(len(experts) for _, experts in demands)


def test_host_tier_saves_the_disk(experts_file):
    path, values = experts_file
    with build(path, 2, host_slots=18) as runtime:
        runtime.begin_forward(1, 1, continues=True)
        for _ in range(3):
            for layer in range(NUM_LAYERS):
                serve(runtime, layer, list(range(NUM_EXPERTS)), values)
        stats = runtime.stats()["decode"]
        assert runtime.stats()["io"]["reads"] == NUM_LAYERS * NUM_EXPERTS
        assert stats["bytes_from_host"] > stats["bytes_from_disk"] // 2


def test_iterator_closed_early_leaves_the_runtime_usable(experts_file):
    path, values = experts_file
    with build(path, 4) as runtime:
        for stop_after in range(4):
            with closing(runtime.serve(0, list(range(NUM_EXPERTS)))) as served:
                for number, _ in enumerate(served):
                    if number == stop_after:
                        break
            serve(runtime, 1, [0, 5], values)
            serve(runtime, 0, list(range(NUM_EXPERTS)), values)
            runtime.check_integrity()


def test_expert_in_flight_is_not_copied_a_second_time(experts_file):
    path, values = experts_file
    with build(path, 6) as runtime:
        served = runtime.serve(0, [0, 1, 2, 3])
        next(served)
        served.close()  # the others are still on their way, or have just arrived
        serve(runtime, 0, [0, 1, 2, 3], values)
        assert runtime.stats()["io"]["reads"] == 4


def test_resident_experts_come_first(experts_file):
    path, values = experts_file
    with build(path, 6) as runtime:
        serve(runtime, 0, [4, 5], values)
        with closing(runtime.serve(0, [0, 1, 4, 5])) as served:
            order = [expert for expert, _ in served]
        assert set(order[:2]) == {4, 5}


class HeldStreams(HostStreams):
    """Copies that do not run until they are released, and compute that never waits: a slow GPU queue."""

    def __init__(self):
        self.queued, self.released = [], threading.Event()

    def copy(self, target, source, after):
        self.queued.append((target, source))
        return self.released

    def synchronize(self, event):
        if event is not None:
            event.wait()

    def release(self):
        for target, source in self.queued:
            target.copy_(source)
        self.released.set()


def test_host_slot_is_not_overwritten_while_a_copy_reads_it(experts_file, monkeypatch):
    path, values = experts_file
    streams = HeldStreams()
    runtime = build(path, 2, host_slots=1, streams=streams)
    transfers, read_again = runtime._transfers, threading.Event()
    first, second = ExpertKey(0, 1), ExpertKey(0, 2)
    transfers.start(first, runtime.cache.reserve(first), None)
    transfers.wait_completed()
    read = runtime.store.read

    def reading(key, record):
        found = read(key, record)
        read_again.set()
        return found

    monkeypatch.setattr(runtime.store, "read", reading)
    transfers.start(second, runtime.cache.reserve(second), None)
    read_again.wait(0.3)  # it must not come: the only host slot is still being copied from
    streams.release()
    transfers.wait_completed()
    record = runtime._records[0]
    assert torch.equal(runtime._pool.views(runtime.cache.slot(first), record)["w"], values[0, 1])
    runtime.close()
