"""The slots of a model on a GPU, and their governor, over a driver that is not there."""

import pytest
import torch

from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, build, write_experts
from helpers.two_cards import TwoCards
from moeflow.core import PAGE_BYTES
from moeflow.loading import tiers
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.gpu import Gpu
from moeflow.loading.gpu_memory import GpuMemory
from moeflow.loading.options import LoadOptions
from moeflow.loading.tiers import Experts, build_runtime
from moeflow.loading.warm_up import WarmUp
from moeflow.offload.arena.segmented_pool import SegmentedPool

MIB = 1 << 20
CPU = torch.device("cpu")


class PoolOnTheCpu(SegmentedPool):
    """A GPU's slots in the CPU's memory."""

    def __init__(self, num_slots, record_bytes, device, *, num_open):
        super().__init__(num_slots, record_bytes, device, num_open=num_open, segment_bytes=2 * PAGE_BYTES)

    def _memory_for(self, segment):
        return torch.empty(len(self.slots_of(segment)), self.stride, dtype=torch.uint8)


class Card:
    """The second of two cards, with counters of memory."""

    def __init__(self, monkeypatch):
        self.others = self.emptied = 0
        self.pools = []
        self.cards = TwoCards(monkeypatch)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free_bytes(), 400 * MIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated_bytes())
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.allocated_bytes())
        pools = self.pools

        class Pool(PoolOnTheCpu):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                pools.append(self)

        monkeypatch.setattr(tiers, "SegmentedPool", Pool)
        monkeypatch.setattr(tiers, "PinnedPool", self.pinned)

    def pinned(self, num_slots, record_bytes, registrar, least_slots):
        return tiers.SlotPool(num_slots, record_bytes, CPU)

    def allocated_bytes(self):
        return sum(pool.num_open_bytes for pool in self.pools)

    def free_bytes(self):
        return 300 * MIB - self.others - self.allocated_bytes()

    def empty_cache(self):
        self.emptied += 1


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


@pytest.fixture
def load(tmp_path, card):
    path, _ = write_experts(tmp_path / "experts.bin")
    with build(path, 3) as other:
        layers = other.store.layers
    experts = Experts([path], None, layers, ExpertsSize.of([one.layout for one in layers], 2, whole_slots=True))

    def load(**options):
        gpu = Gpu(GpuMemory(torch.device("cuda:1")), WarmUp(4096, 192 * MIB), PAGE_BYTES)
        options = LoadOptions(device="cuda:1", **options)
        return build_runtime(experts, options, None, None, bytes_per_position=1, gpu=gpu)

    return load


def slots_after_passes(runtime):
    """Return the slots that have memory, and that may be used, when the governor has no more to do."""
    for _ in range(12):
        runtime.begin_forward(1, 1, continues=False)
    assert runtime._residency.pool.num_open == runtime.stats()["slots"]
    return runtime._residency.pool.num_open


def test_auto_gives_segments_back_where_a_neighbour_takes_the_card_and_takes_them_again(load, card):
    runtime = load()
    with runtime:
        assert slots_after_passes(runtime) == NUM_LAYERS * NUM_EXPERTS
        emptied, card.others = card.emptied, 200 * MIB
        assert slots_after_passes(runtime) == 4  # a token needs three
        assert card.emptied == emptied + 1
        card.others = 0
        assert slots_after_passes(runtime) == NUM_LAYERS * NUM_EXPERTS
        runtime.check_integrity()
    assert card.cards.touched == {1}


def test_auto_takes_what_a_neighbour_leaves_after_loading(load, card):
    card.others = 300 * MIB - int((192 * MIB + 7 * PAGE_BYTES) / 0.98)  # slack, activations, keys and values, six slots
    runtime = load()
    with runtime:
        assert slots_after_passes(runtime) == 6
        card.others = 0
        assert slots_after_passes(runtime) == NUM_LAYERS * NUM_EXPERTS


def test_a_budget_in_bytes_is_kept(load, card):
    runtime = load(expert_memory=10 * PAGE_BYTES)
    with runtime:
        card.others = 290 * MIB
        assert slots_after_passes(runtime) == 10
        card.others = 0
        assert slots_after_passes(runtime) == 10
