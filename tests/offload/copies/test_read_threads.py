"""Reading threads: parts of one read run beside each other, and however that ends, none runs any more."""

import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from helpers.expert_runtimes import PAGES, build, fetch, write_experts
from moeflow.checkpoint.reading.parts import Part
from moeflow.core import ExpertKey, Tier
from moeflow.offload.copies import read_threads
from moeflow.offload.copies.read_threads import ReadingThreads
from moeflow.offload.copies.transfer import Transfer


@pytest.fixture
def threads():
    found = ReadingThreads(1)
    yield found
    found.stop()


def parts(number):
    return [Part(0, 0, 4096 * each, 4096 * each + 4096, memoryview(b"")) for each in range(number)]


def test_parts_run_at_the_same_time_and_each_once(threads):
    together, ran = threading.Barrier(4), []

    def run(part):
        together.wait(10)
        ran.append(part)

    with closing(threads.share(run, parts(4))) as done:
        assert sorted(done) == parts(4)
    assert sorted(ran) == parts(4)
    assert threading.current_thread() not in threads._helpers


def test_no_more_than_three_helpers_a_thread(threads):
    for _ in range(3):
        assert len(list(threads.share(lambda part: None, parts(20)))) == 20
    assert len(threads._helpers) == 3


@pytest.mark.parametrize("ends", ["a failure", "an early close"])
def test_what_runs_elsewhere_ends_before_the_read_does(threads, ends):
    begun, release, running = threading.Semaphore(0), threading.Event(), []

    def run(part):
        if threading.current_thread() is reader:
            assert begun.acquire(timeout=10)
            if ends == "a failure":
                raise OSError("the disk failed")
            return
        running.append(part)
        begun.release()
        assert release.wait(10)
        running.remove(part)

    def read():
        with closing(threads.share(run, parts(2))) as done:
            next(done)

    outcome = []

    def attempt():
        try:
            read()
        except OSError as error:
            outcome.append(str(error))
        outcome.append(list(running))

    reader = threading.Thread(target=attempt)
    reader.start()
    reader.join(0.2)  # it must not end: another part is still running
    release.set()
    reader.join(10)
    assert outcome == (["the disk failed", []] if ends == "a failure" else [[]])


def test_a_system_that_gives_no_more_threads_reads_in_one(threads, monkeypatch):
    def refused(**options):
        raise RuntimeError("can't start new thread")

    stand_in = SimpleNamespace(Thread=refused, current_thread=threading.current_thread)
    monkeypatch.setattr(read_threads, "threading", stand_in)
    assert list(threads.share(lambda part: None, parts(3))) == parts(3)
    ran = []

    def run(part):
        ran.append(part)
        raise OSError("the disk failed")

    with pytest.raises(OSError, match="the disk failed"):
        list(threads.share(run, parts(3)))
    assert ran == parts(1), "no part begins once one has failed"


def queued(expert, *work):
    transfer = Transfer(ExpertKey(0, expert), 0, Tier.DISK, None, prefetch=False)
    transfer.give_work(work)
    return transfer


def test_there_is_room_where_no_transfer_waits_for_a_thread(threads):
    both_are_queued, seen = threading.Event(), []

    def look():
        assert both_are_queued.wait(10)
        seen.append(threads.has_room)

    for expert in (0, 1):
        threads.put(queued(expert, look))
    both_are_queued.set()
    assert [threads.wait().error for _ in range(2)] == [None, None]
    assert seen == [False, True]


@pytest.mark.parametrize("shared", [False, True])
def test_garbage_collection_in_a_reading_thread_does_not_wait_for_that_thread(tmp_path, shared):
    path, values = write_experts(tmp_path / "experts.bin", PAGES)
    runtime = build(path, 3, layout=PAGES)
    fetch(runtime, 0, [0], values)
    held, reading = runtime._parts, runtime._transfers._threads
    collected = threading.Event()

    def collect(part=None):
        if reading.here:
            held.collect()
            collected.set()
        else:
            assert collected.wait(10)  # leave a part to a helper

    if shared:
        list(reading.share(collect, parts(2)))
    else:
        reading.put(queued(1, collect))
    assert collected.wait(10)
    for thread in threading.enumerate():
        if thread.name == "moeflow-release":
            thread.join(10)
            assert not thread.is_alive()
    assert held.pools[0]._arena is None
    runtime.close()
