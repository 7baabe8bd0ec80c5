"""Fetch of one layer's demanded experts, each once: the resident ones first, the others as they arrive.

Decides the order and the place, device or host tier. Knows nothing of the arithmetic.
"""

import time
from collections import deque
from collections.abc import Generator

from moeflow.core import ExpertKey, RecordLayout
from moeflow.errors import ExpertReadError
from moeflow.offload.host_compute import HostCompute, HostTokens
from moeflow.offload.prediction_loop import PredictionLoop, RouterOutput
from moeflow.offload.residency import Residency
from moeflow.offload.slot_pool import Resident
from moeflow.offload.stats import PhaseStats, Stats


class ExpertFetch:
    """Answers a layer's demand, and tells the predictor of it.

    Args:
        residency: brings experts to the device.
        host_compute: the experts that the CPU computes where they lie; None where all are copied.
        prediction: takes in demands and router outputs; None without a predictor.
        stats: the counters.
    """

    def __init__(
        self,
        residency: Residency,
        host_compute: HostCompute | None,
        prediction: PredictionLoop | None,
        stats: Stats,
    ) -> None:
        self._residency = residency
        self._host_compute = host_compute
        self._prediction = prediction
        self._stats = stats

    def fetch(
        self,
        layer: int,
        records: list[RecordLayout],
        num_tokens: dict[ExpertKey, int],
        router_output: RouterOutput | None,
        tokens_on_host: HostTokens | None,
        together: bool = False,
    ) -> Generator[list[Resident], None, None]:
        """Yield every demanded expert once; see `ExpertRuntime.fetch`.

        Args:
            layer: number among the MoE layers.
            records: [E], how its experts are stored.
            num_tokens: of each demanded expert.
            router_output: what the router chose for each token, for the predictor.
            tokens_on_host: of the call, sent where experts are computed in host memory.
            together: see `ExpertRuntime.fetch`.
        """
        stats, residency, prediction = self._stats.now, self._residency, self._prediction
        if self._host_compute is not None:
            residency.settle_ended()
        demand = residency.claim(layer, list(num_tokens))
        held, in_flight, absent = list(demand.resident), demand.in_flight, demand.absent
        on_host: list[ExpertKey] = []
        if self._host_compute is not None:
            on_host = self._host_compute.choose(absent, num_tokens, residency.cache, residency.pool.stride)
        to_start, resident = deque(key for key in absent if key not in on_host), held.copy()
        waiting = {*to_start, *in_flight}
        went_on, stall_s = bool(waiting and (held or on_host)), stats.stall_s
        stats.decisions.layers_ready += not waiting
        stats.hits += len(held)
        stats.misses += len(absent) + len(in_flight)
        stats.waited_for_prefetch += len(in_flight)

        def arrive(arrived: list[ExpertKey]) -> None:
            resident.extend(arrived)
            held.extend(arrived)

        try:
            if prediction is not None:
                prediction.record_demand(demand)
            if on_host and tokens_on_host is not None:
                tokens_on_host.send()
            residency.start(to_start)
            if prediction is not None and router_output is not None:
                prediction.observe(layer, router_output, stats)
                arrive(residency.prefetch(waiting))
            if self._host_compute is not None and on_host:
                if resident:  # the device works while the CPU does
                    yield from self._use(resident, held, records, stats)
                    resident.clear()
                    residency.start(to_start)
                if tokens_on_host is not None:
                    tokens_on_host.wait()
                yield from self._fetch_from_host(self._host_compute, on_host, records, stats)
            while resident or waiting:
                if not resident or (together and waiting and len(residency.transfers)):
                    residency.start(to_start)
                    arrive(residency.await_one(waiting))
                    continue
                batch = [resident.pop()] if to_start else resident[::-1]
                if not to_start:
                    resident.clear()
                yield from self._use(batch, held, records, stats)
                if to_start:
                    residency.start(to_start)
                else:
                    arrive(residency.prefetch(waiting))
            stats.decisions.layers_waited += stats.stall_s > stall_s
            stats.decisions.went_on_with_resident += went_on
            stats.decisions.hidden_behind_resident += went_on and stats.stall_s == stall_s
        except (GeneratorExit, ExpertReadError) as end:
            # Both are raised only where `held` equals the pins. KeyboardInterrupt may fall between: then `_mend` of the
            # runtime clears the cache.
            if isinstance(end, ExpertReadError):
                residency.settle_all()  # a copy that fails later must not be blamed on the next call
            residency.release(held)
            raise
        finally:
            if self._host_compute is not None:
                self._host_compute.release()

    def demanded(self) -> tuple[int, float]:
        """Return how many experts were demanded since the counters were reset, and the seconds that compute waited."""
        return self._stats.demanded()

    def found(self, layer: int, experts: list[int], router_output: RouterOutput | None) -> None:
        """Take in a layer that ran with all its experts before it asked: count it, and feed the predictor.

        Args:
            layer: number among the MoE layers.
            experts: distinct ones, all resident.
            router_output: what the router chose for each token, for the predictor.
        """
        stats, residency, prediction = self._stats.now, self._residency, self._prediction
        demand = residency.claim(layer, [ExpertKey(layer, expert) for expert in experts])
        residency.release(demand.resident)
        stats.decisions.layers_ready += 1
        stats.hits += len(experts)
        if prediction is not None:
            prediction.record_demand(demand)
            if router_output is not None:
                prediction.observe(layer, router_output, stats)
                residency.prefetch()

    def _use(
        self, batch: list[ExpertKey], held: list[ExpertKey], records: list[RecordLayout], stats: PhaseStats
    ) -> Generator[list[Resident], None, None]:
        """Yield pinned experts once, unpin them and take them out of `held`."""
        residents = self._residency.begin_use(batch, records)
        begin = time.perf_counter()
        try:
            yield residents
        finally:
            stats.compute_s += time.perf_counter() - begin
            self._residency.end_use(batch)
            for key in batch:
                held.remove(key)

    def _fetch_from_host(
        self, host_compute: HostCompute, on_host: list[ExpertKey], records: list[RecordLayout], stats: PhaseStats
    ) -> Generator[list[Resident], None, None]:
        """Yield experts where they lie in the host tier; copy one to the device where the link is idle."""
        residency = self._residency
        for key in on_host:
            record = records[key.expert]
            yield [host_compute.start(key, record)]
            stats.compute_s += host_compute.finish(key, record.num_bytes)
            stats.decisions.computed_on_host += 1
            # Without this an expert that is always computed here would never become resident.
            transfers = residency.transfers
            if transfers.has_room and not transfers.num_on_link and key not in residency.cache.slots:
                stats.decisions.copied_after_compute += residency.copy(key, only_if_likelier=True) is not None
