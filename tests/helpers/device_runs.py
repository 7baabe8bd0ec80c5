"""The real runtime over a GPU of queues: passes of several streams, drawn from a seed, with all that may go wrong."""

import contextlib
import random
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.disturbed_store import DisturbedStore
from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, SHORT, GivenSplit, build
from helpers.fake_predictor import Foretold, random_routes
from helpers.queued_device import QueuedDevice, pages
from helpers.race_detector import RaceDetector
from helpers.stepped_threads import SteppedThreads
from helpers.watched_pool import WatchedPool
from moeflow.core import PAGE_BYTES, ExpertKey
from moeflow.errors import ExpertReadError
from moeflow.moe.split_compute import TokensOnHost
from moeflow.offload import streams, transfers
from moeflow.offload.arena import device_governor
from moeflow.offload.arena.device_governor import DeviceGovernor, DeviceMemory
from moeflow.offload.copies import read_threads
from moeflow.offload.prediction_loop import PredictionLoop, RouterOutput
from moeflow.offload.slot_pool import Resident
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.early_launch import launch_early
from moeflow.offload.trusting.trusted_step import NotTrustedError
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger

_TOP_K = 2
_FAILURE = "it is gone"  # in the words of errors that are meant


class Noticed(Exception):
    """A run ends early: something was found."""


class DeviceRun:
    """One run of a runtime, from its seed.

    Attributes:
        wrong: values that a kernel found in a slot and should not have, a line each.
        failure_rate: of reads and copies that fail.
        given_back: storages of segments.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.detector = RaceDetector()
        self.threads = SteppedThreads(self.random, self.detector)
        eagerness = self.random.choice((0.02, 0.3, 0.7))
        self.device = QueuedDevice(
            self.random, self.detector, self.threads.step, eagerness=eagerness, before_copy=self.fail_at_times
        )
        self.wrong: list[str] = []
        self._kept: list[torch.Tensor] = []
        self.given_back: list[StorageWeakRef] = []
        self.failure_rate = self.random.choice((0, 0.03, 0.3))

    @property
    def noticed(self) -> list[str]:
        """What is wrong so far."""
        return self.detector.races + self.wrong

    @contextlib.contextmanager
    def installed(self):
        """Put the stand-ins in the places of the GPU, the threads and the clock."""
        with (
            mock.patch.object(streams, "torch", SimpleNamespace(cuda=self.device.cuda)),
            mock.patch.object(streams, "_PIECE_BYTES", 4096),
            mock.patch.object(transfers, "_PART_BYTES", self.random.choice((4096, 8192))),
            mock.patch.object(device_governor, "_PASSES_PER_MEASUREMENT", 1),
            mock.patch.object(device_governor, "_PASSES_AFTER_REFUSAL", 2),
            mock.patch.object(read_threads, "queue", self.threads.queue),
            mock.patch.object(read_threads, "threading", self.threads.threading),
            mock.patch.object(time, "perf_counter", self.device.clock),
        ):
            try:
                yield
            finally:
                self.threads.end()

    def run(self, experts_files, num_passes=14) -> list[str]:
        """Run passes over the experts of one of the files; return what was noticed."""
        with self.installed(), contextlib.suppress(Noticed):
            self._run(*self.random.choice(experts_files), num_passes)
        return self.noticed

    @contextlib.contextmanager
    def runtime(self, path, values, layout=SHORT, **options):
        """Build a runtime (see `build`), on memory that the kernel of an owner before still uses; close it at the end.

        What has the memory next writes to it.
        """

        def make(pool):
            pool._arena = None  # the device's: the system takes no pages of it back
            if not isinstance(pool, WatchedPool):
                self.device.launch("the owner before", [], writes=_addresses(pool))
            return streams.CudaStreams(torch.device("cuda"))

        self._values = values.numpy().view(np.uint8).reshape(NUM_LAYERS, NUM_EXPERTS, -1)
        store_class = partial(DisturbedStore, run=self)
        runtime = build(path, layout=layout, streams=make, store_class=store_class, **options)
        at_collection = runtime._at_collection
        try:
            yield runtime
        finally:
            addresses = set().union(*map(_addresses, runtime._parts.pools))
            try:
                runtime.close()
            finally:  # where something was lost, not even that may work
                at_collection.detach()
                runtime.store.close()
        self.device.host_access("the next owner", writes=addresses)
        self._look()

    def compute(self, runtime, layer, residents):
        """Compute with experts: in kernels on the calling thread's stream, or at once where they lie on the host."""
        on_host = [resident for resident in residents if resident.pool is not runtime._residency.pool]
        for resident in on_host:
            self.device.host_access("the CPU's arithmetic", reads=_pages_of(resident))
            self._compare(layer, resident)
        here = [resident for resident in residents if resident not in on_host]
        if here:
            steps = [lambda: [self._compare(layer, resident) for resident in here]] * 2  # at its begin and its end
            self.device.launch("a kernel", steps, reads=set().union(*map(_pages_of, here)))

    def fail_at_times(self):
        """Raise, if it is drawn, an error that is meant."""
        if self.random.random() < self.failure_rate:
            raise OSError(_FAILURE)

    def _run(self, path, values, layout, num_passes):
        draw = self.random
        routes = random_routes(
            num_passes, NUM_LAYERS, NUM_EXPERTS, _TOP_K, draw.randrange(1000), stay=draw.choice((0.5, 0.9))
        )
        host_slots = draw.choice((4, 6, 12, 15))
        options = {
            "num_slots": draw.choice((2, 3, 5, 8, 14)),
            "policy": draw.choice(("lru", "lfru", "forecast")),
            "host_slots": host_slots,
            "misses": draw.choice((None, GivenSplit(0, 1, 2))) if host_slots > 4 else None,
            **self._segments(),
            "predicting": None if draw.random() < 0.3 else partial(_prediction, routes=routes, draw=draw),
        }
        callers = [self.device.cuda.Stream() for _ in range(draw.choice((1, 2, 4)))]
        with self.runtime(path, values, layout, **options) as runtime:
            runtime.trusting = self._trusting(runtime) if draw.random() < 0.5 else None
            for number in range(num_passes):
                with self.device.stream(draw.choice(callers)):
                    if number and runtime.trusting is not None and draw.random() < 0.5:
                        self._trusted_step(runtime, routes[number])
                    else:
                        self._pass(runtime, routes[number], number)
                self._look()
            runtime.check_integrity()

    def _segments(self):
        """Draw whether the slots lie in segments, which a governor gives back and takes as memory is free."""
        draw = self.random
        if draw.random() < 0.5:
            return {}

        def measure():
            return DeviceMemory(draw.choice((0, 5, 9, 100)) * PAGE_BYTES, draw.choice((0, 2 * PAGE_BYTES)))

        def governor(pool):
            return DeviceGovernor(pool, 2, measure=measure, pass_bytes=4 * PAGE_BYTES, key_value_bytes=2 * PAGE_BYTES)

        return {"pool_class": partial(WatchedPool, self), "governor": governor}

    def _pass(self, runtime, routes, number):
        draw = self.random
        runtime.begin_forward(1, 1, continues=number > 0, token_ids=torch.tensor([[number]]))
        for layer in range(NUM_LAYERS):
            usual = number == 0 or draw.random() < 0.7
            chosen = routes[layer].tolist() if usual else draw.sample(range(NUM_EXPERTS), 4)
            output = None
            if runtime.predicting:
                output = RouterOutput(np.array([chosen]), np.ones((1, len(chosen)), np.float32), None)
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    if runtime.trusting is None or not self._launched_early(runtime, layer, chosen, output):
                        self._ask(runtime, layer, chosen, output)
            except OSError as error:  # of a copy to host memory
                if _FAILURE not in str(error):
                    raise
            self._look()
        if draw.random() < 0.3:  # a caller that gives up what it has asked for
            with _meant():
                runtime.downloads.start(self._on_device(np.zeros(4, np.int32)))

    def _launched_early(self, runtime, layer, chosen, output):
        """Launch a layer before the host knows its routes; return whether it was right."""
        draw, table = self.random, runtime.trusting.table
        ends = draw.choice((False,) * 12 + (True,))
        routes = self._on_device(np.array(chosen, np.int32))

        def launch():
            found = [key for expert in set(chosen) if (key := ExpertKey(layer, expert)) in runtime.cache]
            self._look_up(runtime, table.row(layer), found)
            if ends:
                raise KeyboardInterrupt
            return torch.empty(0)

        with runtime.changing() as residency:
            early = launch_early(
                layer, launch, routes, (1, len(chosen)), table=table, residency=residency, downloads=runtime.downloads
            )
            self.device.host_access("the routes' reader", reads={runtime.downloads._free[-1].memory.data_ptr()})
            if early.values.view(np.int32).tolist() != chosen:
                self.wrong.append(f"the routes {chosen} came down as {early.values.view(np.int32).tolist()}")
            elif early.output is not None:
                if any(ExpertKey(layer, expert) not in runtime.cache for expert in chosen):
                    self.wrong.append(f"a layer that missed one of {chosen} counts as right")
                runtime.expert_fetch.found(layer, early.experts, output)
        return early.output is not None

    def _ask(self, runtime, layer, chosen, output):
        draw, experts = self.random, sorted(set(chosen))
        end = draw.choice((None,) * 12 + (GeneratorExit, KeyboardInterrupt))
        tokens = TokensOnHost(self._on_device(np.array(chosen, np.float32)), runtime.downloads)
        looks_up = runtime.trusting is not None
        fetched = runtime.fetch(layer, experts, output, tokens_on_host=tokens, together=looks_up)
        with _meant(), contextlib.closing(fetched):
            for residents in fetched:
                if looks_up and len(residents) == len(experts) and not residents[0].on_host:
                    runtime.trusting.table.refresh()
                    keys = [ExpertKey(layer, expert) for expert in experts]
                    self._look_up(runtime, runtime.trusting.table.row(layer), keys)
                else:
                    self.compute(runtime, layer, residents)
                if residents[0].on_host:
                    rows = tokens.wait()
                    self.device.host_access("the CPU's arithmetic", reads={rows.data_ptr()})
                    if rows.tolist() != chosen:
                        self.wrong.append(f"the tokens {chosen} came down as {rows.tolist()}")
                if end is GeneratorExit:
                    break
                if end is KeyboardInterrupt:
                    fetched.throw(KeyboardInterrupt())

    def _on_device(self, values):
        """Return memory of the device into which a kernel writes values."""
        memory = torch.from_numpy(np.full_like(values, 77))
        target = memory.numpy()
        self._kept.append(memory)  # a device's allocator gives no other stream its address
        self.device.launch("the router", [lambda: target.__setitem__(slice(None), values)], writes={memory.data_ptr()})
        return memory

    def _trusting(self, runtime):
        table = DeviceTable(runtime.cache, runtime._residency.pool, runtime.experts_per_layer)
        return Trusting(table, runtime._stats)

    def _trusted_step(self, runtime, routes):
        """Run the kernels of a step that looks experts up in the table, without asking the runtime for any."""
        if runtime.predictor is None:
            runtime.begin_forward(1, 1, continues=True)
        table, end = runtime.trusting.table, self.random.choice((None,) * 8 + (NotTrustedError, KeyboardInterrupt))

        def run():
            step = runtime.trusting.step
            if step is None:
                return  # anew, asking: passes do that
            for layer in range(NUM_LAYERS):
                found = [key for expert in routes[layer] if (key := ExpertKey(layer, int(expert))) in runtime.cache]
                if len(found) < _TOP_K:
                    table.missed.numpy()[layer] = 1  # at once: a step's end waits for it
                self._look_up(runtime, table.row(layer), found)
                if layer and end is not None:
                    raise end
                step.add(layer, torch.from_numpy(routes[layer : layer + 1]))

        with contextlib.suppress(KeyboardInterrupt), runtime.changing() as residency:
            runtime.trusting.run(run, residency, runtime.resident_table)

    def _look_up(self, runtime, row, keys):
        """Launch a kernel that finds the slots of experts in a row of the table."""
        pool, row_values = runtime._residency.pool, row.numpy()
        residents = {
            key: Resident(key.expert, pool, runtime.cache.slot(key), runtime.records(key.layer)[key.expert])
            for key in keys
        }

        def step():
            for key, resident in residents.items():
                if row_values[key.expert] != resident.location:
                    self.wrong.append(f"the table says that {key} lies at {row_values[key.expert]}")
                self._compare(key.layer, resident)

        reads = set().union({row.data_ptr()}, *map(_pages_of, residents.values()))
        self.device.launch("a kernel", [step, step], reads=reads)

    def _compare(self, layer, resident):
        expected = self._values[layer, resident.expert]
        if not np.array_equal(resident.pool.record(resident.slot, len(expected)).numpy(), expected):
            self.wrong.append(f"expert {resident.expert} of layer {layer} has other values in slot {resident.slot}")

    def _look(self):
        if any(not memory.expired() for memory in self.given_back):
            self.wrong.append("memory that was given back is held")
        if self.noticed:
            raise Noticed(self.noticed)


@contextlib.contextmanager
def _meant():
    """Go on after an error that is meant."""
    try:
        yield
    except (ExpertReadError, OSError) as error:
        if _FAILURE not in str(error):
            raise


def _addresses(pool):
    slots = [slot for slot in range(pool.num_slots) if slot not in pool.closed_slots()]
    return set().union(*(pages(pool.address_of(slot), pool.stride) for slot in slots))


def _pages_of(resident):
    return pages(resident.address, resident.record.num_bytes)


def _prediction(cache, routes, draw):
    now = np.zeros((len(routes), NUM_LAYERS, NUM_EXPERTS), np.float32)
    for token, layers in enumerate(routes):
        for layer, experts in enumerate(layers):
            now[token, layer, experts] = 0.9
            now[token, layer, draw.randrange(NUM_EXPERTS)] = 0.8
    ledger = PrefetchLedger(NUM_LAYERS, expert_bytes=1 << 20)
    return PredictionLoop(Prefetcher(Foretold(now), cache, ledger, min_probability=0.5))
