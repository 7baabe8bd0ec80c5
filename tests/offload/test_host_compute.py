"""Experts computed in the host tier: bytes, order, pins, and what both ways are measured to take."""

import itertools
import os
import shutil
import threading
from contextlib import closing, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.expert_runtimes import (
    DEMANDS,
    NUM_EXPERTS,
    NUM_LAYERS,
    SIZE,
    GivenSplit,
    ThreadStreams,
    build,
    each,
    empty_device,
    fetch,
    fill_host,
)
from moeflow import load_moe
from moeflow.core import ExpertKey
from moeflow.errors import ExpertReadError
from moeflow.hf import experts_interface
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.host_tier import HostTier
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import POLICIES, ExpertCache
from moeflow.policy.miss_split import MissSplit

NUMBERS = st.lists(st.integers(0, NUM_EXPERTS), min_size=1, max_size=4)


def in_host_memory(runtime, weights):
    """Whether fetched weights are a view of the host tier's slots."""
    begin = runtime._transfers._host.pool.tensor.data_ptr()
    return begin <= weights["w"].data_ptr() < begin + runtime._transfers._host.pool.num_bytes


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(POLICIES)), st.integers(1, 7), st.sampled_from([5, 9, 18]), st.booleans(), NUMBERS, DEMANDS
)
def test_any_mixture_of_host_and_device_is_fetched_right(
    experts_file, policy, num_slots, host_slots, threads, numbers, demands
):
    path, values = experts_file
    streams = ThreadStreams() if threads else None
    with build(path, num_slots, policy, host_slots, streams, GivenSplit(*numbers)) as runtime:
        runtime.begin_forward(1, 1, continues=True)
        for layer, experts in demands:
            fetch(runtime, layer, sorted(experts), values)
            runtime.check_integrity()
            assert not runtime._host_compute._num_tokens
        stats = runtime.stats()["decode"]
        each = ("resident", "waited_for_prefetch", "read", "copied", "computed_on_host")
        demanded = sum(len(experts) for _, experts in demands)
        assert sum(stats["decisions"][name] for name in each) == stats["hits"] + stats["misses"] == demanded
        assert stats["decisions"]["layers_ready"] <= len(demands)


class GatedStreams(ThreadStreams):
    """Copies that begin only while the gate is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def copy(self, target, source, after, **options):
        self._thread.submit(self.gate.wait)
        return super().copy(target, source, after, **options)


class SeenTokens:
    """Tokens on their way to host memory; remembers what it was told."""

    def __init__(self):
        self.said = []

    def send(self):
        self.said.append("sent")

    def wait(self):
        self.said.append("awaited")


def test_the_host_computes_while_copies_run_and_behind_the_resident_experts(experts_file):
    path, values = experts_file
    streams = GatedStreams()
    split = GivenSplit(0)
    with build(path, 6, host_slots=18, streams=streams, misses=split) as runtime:
        fill_host(runtime, values)
        fetch(runtime, 0, [0], values)
        split._numbers = itertools.repeat(2)
        streams.gate.clear()
        order, on_link, tokens = [], [], SeenTokens()
        with closing(runtime.fetch(0, [0, 1, 2, 3], tokens_on_host=tokens)) as fetched:
            for expert, weights in each(fetched):
                order.append((expert, in_host_memory(runtime, weights), *tokens.said))
                on_link.append(runtime._transfers.num_on_link)
                if len(order) == 3:
                    streams.gate.set()  # the resident expert and the CPU's are computed before any wait
                assert len(order) == 4 or torch.equal(weights["w"], values[0, expert])
        assert [in_host for _, in_host, *_ in order] == [False, True, True, False]
        assert order[0] == (0, False, "sent"), "tokens go down before the resident experts are launched"
        assert all(said == ["sent", "awaited"] for _, _, *said in order[1:])
        assert on_link[:3] == [1, 1, 1]
        copied = runtime._transfers.take_copied()
        assert [transfer.beside for transfer in copied][-1:] == [True]
        runtime.check_integrity()


def test_host_slot_is_not_overwritten_while_the_cpu_computes(experts_file, monkeypatch):
    path, values = experts_file
    with build(path, 7, "lfu", host_slots=5, misses=GivenSplit(1)) as runtime:
        for _ in range(3):
            fetch(runtime, 1, [0, 1, 2, 3], values)
            empty_device(runtime)
        fetch(runtime, 0, [0], values)
        empty_device(runtime)
        assert ExpertKey(0, 0) in runtime._transfers._host.cache
        read, has_read = runtime.store.read, threading.Semaphore(0)

        def reading(key, record, **how):
            found = read(key, record, **how)
            has_read.release()
            return found

        monkeypatch.setattr(runtime.store, "read", reading)
        with closing(runtime.fetch(0, [0, 1, 2, 3, 4])) as fetched:
            expert, weights = next(each(fetched))
            assert expert == 0
            assert in_host_memory(runtime, weights)
            for _ in range(4):  # they take every other slot, and expert 0 is the least used
                assert has_read.acquire(timeout=10)
            assert torch.equal(weights["w"], values[0, 0])
            assert sorted(expert for expert, _ in each(fetched)) == [1, 2, 3, 4]
        runtime.check_integrity()


def test_the_cpu_leaves_a_host_slot_for_every_copy_in_flight(experts_file):
    path, values = experts_file
    with build(path, 7, host_slots=5, misses=GivenSplit(NUM_EXPERTS)) as runtime:
        fetch(runtime, 0, [0, 1], values)
        empty_device(runtime)
        fetch(runtime, 0, list(range(NUM_EXPERTS)), values)  # four of them pass through host slots
        decisions = runtime.stats()["prefill"]["decisions"]
        assert (decisions["computed_on_host"], decisions["copied"]) == (1, 1)


def test_nothing_stays_pinned_when_the_iterator_is_closed_early(experts_file):
    path, values = experts_file
    with build(path, 4, host_slots=18, misses=GivenSplit(3)) as runtime:
        fill_host(runtime, values)
        for stop_after in range(5):
            with closing(runtime.fetch(1, list(range(NUM_EXPERTS)))) as fetched:
                for number, _ in enumerate(each(fetched)):
                    if number == stop_after:
                        break
            runtime.check_integrity()
            runtime._transfers._host.cache.check_integrity()
        fetch(runtime, 1, list(range(NUM_EXPERTS)), values)


def test_an_error_leaves_nothing_pinned(experts_file, tmp_path):
    path, values = experts_file
    path = shutil.copy(path, tmp_path / "experts.bin")
    with build(path, 4, host_slots=9, misses=GivenSplit(2)) as runtime:
        fetch(runtime, 0, [0, 1, 2], values)
        empty_device(runtime)
        os.truncate(path, 3 + 4 * SIZE * 3)
        fetched = runtime.fetch(0, [0, 1, 2, 5])
        with pytest.raises(ExpertReadError), closing(fetched):
            list(each(fetched))
        runtime.check_integrity()
        with suppress(ZeroDivisionError), closing(runtime.fetch(0, [0, 1, 2])) as fetched:
            1 / len([next(each(fetched))][1:])
        empty_device(runtime)
        fetch(runtime, 0, [0, 1, 2], values)


def test_an_expert_computed_on_the_host_gets_a_place_on_the_device_when_the_link_is_idle(experts_file):
    path, values = experts_file
    with build(path, 4, host_slots=18, misses=GivenSplit(NUM_EXPERTS)) as runtime:
        fill_host(runtime, values)
        runtime.begin_forward(1, 1, continues=True)
        for _ in range(2):
            fetch(runtime, 2, [1], values)
        decisions = runtime.stats()["decode"]["decisions"]
        assert (decisions["computed_on_host"], decisions["copied_after_compute"], decisions["resident"]) == (1, 1, 1)


def test_more_tokens_make_an_expert_a_later_choice(experts_file):
    path, values = experts_file
    with build(path, 4, host_slots=18, misses=GivenSplit(0)) as runtime:
        fill_host(runtime, values)
        runtime._host_compute._split._numbers = itertools.repeat(1)
        with closing(runtime.fetch(1, [1, 2, 3], num_tokens=[9, 2, 7])) as fetched:
            assert [expert for expert, weights in each(fetched) if in_host_memory(runtime, weights)] == [2]


def test_measured_bandwidths_decide_and_are_reported(experts_file):
    path, values = experts_file
    with build(path, 2, host_slots=18) as runtime:
        assert runtime.stats()["miss"] is None
    with build(path, 2, host_slots=18, misses=MissSplit()) as runtime:
        fill_host(runtime, values)
        for _ in range(100):
            for layer in range(NUM_LAYERS):
                fetch(runtime, layer, [0, 1], values)
                runtime.check_integrity()
        stats = runtime.stats()
        assert stats["miss"]["copy_bytes_per_s"] > 0
        assert stats["miss"]["host_bytes_per_s"] > 0
        assert stats["prefill"]["decisions"]["computed_on_host"] > 0


def test_a_model_whose_experts_are_computed_in_both_places_gives_the_same_logits(mixtral_folder):
    """On this stand-in both places are one device, so even the bits are the same."""
    model, prompt = load_moe(mixtral_folder, device="cpu", predictor=None), torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        expected = model(prompt).logits
    store, cpu = model.moeflow.store, torch.device("cpu")
    num_bytes = store.layers[0].layout.record.num_bytes
    host, split = HostTier(SlotPool(24, num_bytes, cpu), ExpertCache(24)), GivenSplit(1, 3, 0)
    with ExpertRuntime(
        store,
        SlotPool(6, num_bytes, cpu),
        ExpertCache(6),
        ThreadStreams(),
        host=host,
        misses=split,
    ) as runtime:
        for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):
            module._moeflow = OffloadedExperts(runtime, layer, module)
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(model(prompt).logits, expected)
            runtime.check_integrity()
        assert runtime.stats()["prefill"]["decisions"]["computed_on_host"] > 5
        assert split.most_tokens > 1
    model.moeflow.close()
