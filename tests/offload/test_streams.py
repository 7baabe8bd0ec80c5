"""The order of copies, kernels and reads, proven without a GPU: on queues that run in any order that events allow."""

import importlib
import inspect
import pkgutil
import random
from contextlib import closing

import numpy as np
import pytest
import torch

from helpers.device_runs import DeviceRun
from helpers.lost_events import LostEvents
from helpers.queued_device import Event, QueuedDevice, Stream
from helpers.race_detector import RaceDetector
from helpers.stepped_threads import SteppedThreads
from moeflow import offload
from moeflow.offload import streams
from moeflow.offload.copies.read_threads import ReadingThreads
from moeflow.offload.residency import Residency
from moeflow.offload.streams import CudaStreams, HostStreams
from moeflow.offload.trusting.downloads import Downloads

# Ways to order work without an event at hand, or to say that it may be reordered from here on.
ORDERS = (
    Stream.wait_event, Stream.wait_stream, Event.record, Event.synchronize, QueuedDevice.synchronize,
    CudaStreams.finish, ReadingThreads.stop, Residency.end_use, Residency.release, Residency.begin_use_of_all,
    Residency.end_use_of_all, Residency.follow_latest_use, Residency.end_look_up,
)  # fmt: skip


def noticed(experts_files, seed) -> list[str]:
    """Return what a run shows: races, wrong values, or the error that it ends with."""
    try:
        return DeviceRun(seed).run(experts_files)
    except Exception as error:
        return [repr(error)]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_races_and_no_kernel_sees_stale_values(experts_files, seed):
    assert DeviceRun(seed).run(experts_files) == []


@pytest.mark.slow
def test_nothing_races_in_many_runs(experts_files):
    for seed in range(10, 80):
        assert DeviceRun(seed).run(experts_files) == [], f"seed {seed}"


@pytest.mark.slow
def test_each_wait_and_each_event_that_is_taken_out_is_noticed(experts_files):
    names = [found.name for found in pkgutil.walk_packages(offload.__path__, f"{offload.__name__}.")]
    modules = [importlib.import_module(name) for name in names]
    lost = LostEvents(modules, (Event, streams._Point), ORDERS)
    with lost.installed():
        for seed in range(40):
            assert noticed(experts_files, seed) == []
        # All that the rooms ask of streams, these runs have asked, but for the comparison of slots with their source,
        # which reads and never writes: tests/offload/copies/test_slot_sampler.py.
        asked_elsewhere = {site.file for site in lost.unreached("streams.")}
        assert asked_elsewhere <= {"slot_sampler.py"}
        lines, first = inspect.getsourcelines(CudaStreams._leave_copy_stream)  # test_streams_of_two_cards strikes there
        elsewhere = [site for site in lost.unreached("cuda") if site.file == "streams.py"]
        assert [site for site in elsewhere if not first <= site.line < first + len(lines)] == []
        unnoticed = []
        for number in sorted(lost.seen):
            lost.lost = number
            if not any(noticed(experts_files, seed) for seed in range(200)):
                unnoticed.append(str(lost.sites[number]))
    assert unnoticed == []
    assert len(lost.seen) > 50


def test_a_layer_that_is_launched_before_a_copy_of_its_experts_has_ended_is_noticed(experts_file, monkeypatch):
    monkeypatch.setattr(Residency, "have_copied", lambda self, slots: True)
    assert any(noticed(experts_file, seed) for seed in range(60))


def test_an_expert_given_back_unused_stays_in_use_by_the_stream_before(experts_file):
    run = DeviceRun(0)
    run.failure_rate = 0

    def compute(runtime, experts):
        with closing(runtime.fetch(0, experts)) as fetched:
            for residents in fetched:
                run.compute(runtime, 0, residents)

    with run.installed(), run.runtime(*experts_file, num_slots=2, policy="lru", host_slots=6) as runtime:
        first, second = run.device.cuda.Stream(), run.device.cuda.Stream()
        with run.device.stream(first):
            compute(runtime, [0, 1])
            compute(runtime, [0])
        with run.device.stream(second):
            with closing(runtime.fetch(0, [0, 1, 2])) as fetched:
                assert [resident.expert for resident in next(fetched)] == [1]  # 0 has waited for its turn in vain
            compute(runtime, [3, 4])
    assert run.noticed == []


class Machine:
    """A GPU of queues, and one copy stream on it, where `streams` asks for CUDA."""

    def __init__(self, monkeypatch, device="cuda:0", *, current=0, eagerness=0.0):
        self.detector = RaceDetector()
        self.device = QueuedDevice(random.Random(0), self.detector, eagerness=eagerness)
        self.device.current_device = current
        monkeypatch.setattr(streams, "torch", type("torch", (), {"cuda": self.device.cuda}))
        self.streams = CudaStreams(torch.device(device))

    def read(self, memory) -> list[float]:
        """Launch a kernel; return a list that gets the first number of the memory once the kernel has run."""
        seen = []
        self.device.launch("a kernel", [lambda: seen.append(float(memory[0]))], reads={memory.data_ptr()})
        return seen


@pytest.mark.parametrize("waits", [True, False])
def test_a_wait_that_is_missing_is_named_and_shows(monkeypatch, waits):
    found = []
    for seed in range(5):
        machine = Machine(monkeypatch)
        machine.device.random = random.Random(seed)
        target, source = torch.zeros(4), torch.ones(4)
        copied = machine.streams.copy(target, source, None)
        if waits:
            machine.streams.wait(copied)
        seen = machine.read(target)
        machine.streams.finish()
        found.append(seen[0])
        assert bool(machine.detector.races) == (not waits)
    assert (set(found) == {1.0}) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_not_written_before_its_readers_have_ended(monkeypatch, waits):
    machine = Machine(monkeypatch)
    target, source = torch.zeros(4), torch.ones(4)
    machine.read(target)
    copied = machine.streams.copy(target, source, machine.streams.compute_event() if waits else None)
    assert bool(machine.detector.races) == (not waits)
    machine.detector.races.clear()
    if waits:
        machine.streams.synchronize(copied)
    machine.device.host_access("a read", writes={source.data_ptr()})
    assert bool(machine.detector.races) == (not waits)


@pytest.mark.parametrize("handed", [True, False])
def test_threads_are_ordered_by_what_they_hand_over_and_nothing_else(handed):
    detector = RaceDetector()
    threads, done = SteppedThreads(random.Random(0), detector), []
    given = threads.queue.SimpleQueue()

    def work():
        detector.access(detector.host(), "the thread", writes={1})
        done.append(True)
        given.put(None)

    thread = threads.threading.Thread(target=work, daemon=True)
    thread.start()
    if handed:
        given.get()
    else:
        threads.step(lambda: bool(done))
    detector.access(detector.host(), "the caller", writes={1})
    assert bool(detector.races) == (not handed)
    thread.join()
    threads.end()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_only_the_own_gpu_is_touched_whichever_is_current(monkeypatch, device):
    machine = Machine(monkeypatch, device, current=1 if device == "cuda" else 0)
    machine.device.current_device = 0
    target, source = torch.zeros(4), torch.ones(4)
    copied = machine.streams.copy(target, source, machine.streams.compute_event())
    machine.streams.wait(copied)
    machine.streams.synchronize(copied)
    assert machine.streams.done(copied)
    assert machine.streams.copy_s(copied) > 0
    machine.streams.synchronize(machine.streams.bring_down(source, target))
    machine.streams.finish()
    assert machine.device.touched == {1}


def test_events_are_used_again_once_nothing_holds_them(monkeypatch):
    machine = Machine(monkeypatch)
    target, source = torch.zeros(4), torch.ones(4)
    held = machine.streams.copy(target, source, None)
    machine.streams.synchronize(held)
    copy_s = machine.streams.copy_s(held)
    for _ in range(50):
        copied = machine.streams.copy(target, source, machine.streams.compute_event())
        machine.streams.synchronize(copied)
    assert machine.device.num_events <= 1 + 3 * 2 + 2  # of the stream's begin; three pairs; two of compute
    assert machine.streams.copy_s(held) == copy_s


def test_a_copy_is_timed_without_those_before_it(monkeypatch):
    machine = Machine(monkeypatch)
    target, source = torch.zeros(4), torch.ones(4)
    machine.streams.finish()
    copied = [machine.streams.copy(target, source, None) for _ in range(20)]
    machine.streams.synchronize(copied[-1])
    np.testing.assert_allclose([machine.streams.copy_s(each) for each in copied], 3e-6, rtol=1e-3)


def test_a_copy_on_demand_does_not_wait_for_prefetches_that_cannot_begin(monkeypatch):
    machine = Machine(monkeypatch)
    never = machine.device.cuda.Event()
    never.record(blocked := machine.device.cuda.Stream())
    blocked.queue.appendleft(lambda: False)
    target, source = torch.zeros(4), torch.ones(4)
    waits = streams._Point((never,), [])
    for _ in range(3):
        machine.streams.copy(torch.zeros(4), source, waits, is_prefetch=True)
    machine.streams.synchronize(machine.streams.copy(target, source, None))
    assert torch.equal(target, source)


def test_memory_of_downloads_is_used_again_once_nobody_holds_it():
    downloads = Downloads(HostStreams(), is_pinned=False)
    first, second = downloads.start(torch.full((9, 700), 1.5)), downloads.start(torch.arange(5))
    assert first.wait().view(np.float32).tolist() == [1.5] * 6300
    assert second.wait().view(np.int64).tolist() == [0, 1, 2, 3, 4]
    addresses = {first.wait().ctypes.data, second.wait().ctypes.data}
    assert len(addresses) == 2
    del first, second
    for _ in range(5):
        small, large = downloads.start(torch.arange(5)), downloads.start(torch.full((6300,), 2.5))
        assert small.wait().tolist() == torch.arange(5).view(torch.uint8).tolist()
        assert large.wait().view(np.float32).tolist() == [2.5] * 6300
        del small, large
    assert len(downloads._free) <= 3


def test_a_long_copy_runs_in_pieces(monkeypatch):
    monkeypatch.setattr(streams, "_PIECE_BYTES", 1000)
    machine = Machine(monkeypatch)
    target, source = torch.zeros(4500, dtype=torch.uint8), torch.arange(4500).to(torch.uint8)
    copies = []
    machine.device.before_copy = lambda: copies.append(1)
    machine.streams.synchronize(machine.streams.copy(target, source, None))
    assert torch.equal(target, source)
    assert len(copies) == 5
