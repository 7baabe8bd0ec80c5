"""The budget on a GPU that others use too: whole segments go under pressure, and come again when there is room."""

from types import SimpleNamespace

import pytest
import torch

from helpers.device_runs import DeviceRun
from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, build, fetch
from moeflow.core import PAGE_BYTES
from moeflow.offload.arena import device_governor
from moeflow.offload.arena.device_governor import DeviceGovernor, DeviceMemory, DeviceMeter
from moeflow.offload.arena.segmented_pool import SegmentedPool

MIB = 1 << 20


def governor(measure=None, *, slots=1000, least=9):
    pool = SimpleNamespace(in_segment=85, stride=3 * MIB, num_slots=slots)  # segments of 255 MiB
    return DeviceGovernor(pool, least, measure=measure, pass_bytes=800 * MIB, key_value_bytes=400 * MIB)


def target(limit, free, key_values=0, **options):
    return governor(**options).target(limit, DeviceMemory(free * MIB, key_values * MIB))


def test_it_stays_as_it_is_while_passes_and_keys_and_values_take_what_was_left_for_them():
    for taken in range(0, 401, 50):
        assert target(500, 1200 - taken, taken) == 500
        assert target(500, 1200 + 254 - taken, taken) == 500
    assert target(500, 601, 400) == 500


def test_it_gives_back_as_many_segments_as_are_missing():
    assert target(500, 599) == 500 - 85
    assert target(500, 600 - 255) == 500 - 85
    assert target(500, 600 - 256) == 500 - 2 * 85
    assert target(500, 0) == 500 - 3 * 85


def test_it_takes_half_of_the_segments_that_there_is_room_for():
    assert target(500, 1200 + 255) == 500 + 85
    assert target(300, 1200 + 5 * 255) == 300 + 3 * 85
    assert target(500, 1200 - 400 + 255, 400) == 500 + 85


def test_it_stays_between_its_bounds():
    assert target(100, 0) == 9
    assert target(990, 100_000) == 1000


def test_it_measures_every_few_passes_and_in_every_prefill():
    measured = []

    def measure():
        measured.append(1)
        return DeviceMemory(1200 * MIB, 0)

    one = governor(measure)
    for number in range(8):
        one.slots(0, 500)
        assert len(measured) == (number + 1) // 4
    one.slots(0, 500, now=True)
    assert len(measured) == 3


def test_what_the_device_refused_is_not_asked_for_again_at_once():
    room = DeviceMemory(5000 * MIB, 0)
    one = governor(lambda: room)
    assert one.slots(0, 500, now=True) > 500
    assert [one.slots(0, 500, now=True) for _ in range(64)] == [500] * 64
    room = DeviceMemory(0, 0)
    assert one.slots(0, 500, now=True) < 500
    room = DeviceMemory(5000 * MIB, 0)
    assert one.slots(0, 245, now=True) > 245
    assert one.slots(0, 330, now=True) > 330  # a part of it came


def test_the_meter_reads_its_own_gpu_and_counts_what_the_allocator_keeps_as_free(monkeypatch):
    counters = {"allocated": 100 * PAGE_BYTES, "reserved": 120 * PAGE_BYTES, "free": 50 * PAGE_BYTES}
    device, asked = torch.device("cuda", 1), set()

    def read(name):
        def answer(of):
            asked.add(of)
            return (counters[name], 10**9) if name == "free" else counters[name]

        return answer

    monkeypatch.setattr(torch.cuda, "memory_allocated", read("allocated"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", read("reserved"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", read("free"))
    pool = SimpleNamespace(device=device, num_open_bytes=60 * PAGE_BYTES)
    meter = DeviceMeter(pool)
    assert meter.measure() == DeviceMemory(70 * PAGE_BYTES, 0)
    counters["allocated"] += 7 * PAGE_BYTES
    assert meter.measure() == DeviceMemory(63 * PAGE_BYTES, 7 * PAGE_BYTES)
    counters["allocated"] -= 20 * PAGE_BYTES
    pool.num_open_bytes -= 20 * PAGE_BYTES
    assert meter.measure() == DeviceMemory(83 * PAGE_BYTES, 7 * PAGE_BYTES)
    assert asked == {device}


def test_a_neighbour_takes_the_memory_after_loading_and_leaves(experts_file, monkeypatch):
    monkeypatch.setattr(device_governor, "_PASSES_PER_MEASUREMENT", 1)
    path, values = experts_file
    neighbour = [0]

    def governed(pool):
        def measure():
            whole = (12 + 6) * PAGE_BYTES  # all the slots, and what passes need
            return DeviceMemory(max(whole - neighbour[0] * PAGE_BYTES - pool.num_open_bytes, 0), 0)

        return DeviceGovernor(pool, 3, measure=measure, pass_bytes=6 * PAGE_BYTES, key_value_bytes=0)

    def pool(*arguments):
        return SegmentedPool(*arguments, segment_bytes=2 * PAGE_BYTES)

    with build(path, 12, host_slots=15, pool_class=pool, governor=governed) as runtime:
        seen = []
        for neighbour[0] in (0, 0, 7, 7, 100, 100, 7, 7, 7, 0, 0, 0, 0):
            runtime.begin_forward(1, 1, continues=True)
            for layer in range(NUM_LAYERS):
                fetch(runtime, layer, list(range(NUM_EXPERTS)), values)
            runtime.check_integrity()
            seen.append(runtime._residency.pool.num_open)
        assert runtime.stats()["slots"] == 12
    assert seen == [12, 12, 6, 6, 4, 4, 4, 4, 4, 8, 10, 12, 12]


@pytest.mark.parametrize("strikes", ["give_back", "take"])
def test_an_interrupt_while_memory_moves_leaves_a_runtime_that_works(experts_file, strikes):
    path, values = experts_file

    class Interrupted(SegmentedPool):
        struck = False

        def _release(self, segment):
            self.strike("give_back")
            super()._release(segment)

        def take(self, segment):
            return super().take(segment) and not self.strike("take")

        def strike(self, where):
            if where == strikes and not self.struck:
                self.struck = True
                raise KeyboardInterrupt

    limits = iter((4, 4, 12, 12, 12))

    def pool(*arguments):
        return Interrupted(*arguments, segment_bytes=2 * PAGE_BYTES)

    def governed(pool):
        return SimpleNamespace(slots=lambda used, limit, now: next(limits))

    with build(path, 12, host_slots=15, pool_class=pool, governor=governed) as runtime:
        for _ in range(5):
            try:
                runtime.begin_forward(1, 1, continues=True)
            except KeyboardInterrupt:
                continue
            for layer in range(NUM_LAYERS):
                fetch(runtime, layer, list(range(NUM_EXPERTS)), values)
            runtime.check_integrity()
        assert runtime._residency.pool.struck
        assert runtime._residency.pool.num_open == runtime.cache.limit == 12


def test_runs_with_other_owners_give_memory_back_and_take_it_again(experts_files):
    given_back = 0
    for seed in range(20):
        run = DeviceRun(seed)
        assert run.run(experts_files) == []
        given_back += len(run.given_back)
    assert given_back > 10
