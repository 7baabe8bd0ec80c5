"""The runtime behind one model: one lock over the tiers of its experts, and all resources that must be released.

Takes in passes and demands, and reports statistics. `ExpertFetch` answers a demand, `Residency` moves experts. Knows
nothing of routers or arithmetic.
"""

import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES, ExpertKey, RecordLayout, records_of
from moeflow.errors import ClosedModelError, ConfigError, ExpertReadError, ForkedProcessError, MoeflowError
from moeflow.fork import tell_of_forks
from moeflow.offload.arena.governor import Governor
from moeflow.offload.copies.slot_sampler import SlotSampler
from moeflow.offload.fetch import ExpertFetch
from moeflow.offload.host_compute import HostCompute, HostTokens
from moeflow.offload.host_tier import HostTier
from moeflow.offload.prediction_loop import PredictionLoop, RouterOutput
from moeflow.offload.residency import Residency
from moeflow.offload.resident_table import ResidentTable
from moeflow.offload.route_observer import RouteObserver
from moeflow.offload.slot_pool import Resident, SlotPool
from moeflow.offload.stats import Contract, PythonSteps, ReadStats, RuntimeStats, Stats, memory_stats
from moeflow.offload.streams import Streams
from moeflow.offload.transfers import Parts, Transfers
from moeflow.offload.trusting.device_table import DeviceTable
from moeflow.offload.trusting.downloads import Downloads
from moeflow.offload.trusting.trusting import Trusting
from moeflow.policy.cache import ExpertCache
from moeflow.policy.miss_split import MissSplit
from moeflow.predictors.protocol import Predictor
from moeflow.turns import Turns

if TYPE_CHECKING:
    from moeflow.hf.passes.forward import ForwardPass


class ExpertRuntime:
    """`model.moeflow`: the experts of one model in their budget, of `experts_per_layer`, until it is `closed`.

    Args:
        store: the far tier.
        pool: device slots.
        cache: which expert sits in which slot.
        streams: the order between copies and compute on the device.
        host: the pinned tier, on machines where the device has its own memory.
        num_threads: experts read from disk at a time.
        expert_budget_bytes: the user's budget; the slots' bytes when None.
        governor: moves the number of usable slots with the memory that is free ("auto").
        prediction: chooses prefetches; None for demand only.
        misses: chooses the experts that the CPU computes in the host tier; None where all are copied.
        sampler: compares some slots with their source; None for none.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        cache: ExpertCache,
        streams: Streams,
        *,
        host: HostTier | None = None,
        num_threads: int = 4,
        expert_budget_bytes: int | None = None,
        governor: Governor | None = None,
        prediction: PredictionLoop | None = None,
        misses: MissSplit | None = None,
        sampler: SlotSampler | None = None,
    ) -> None:
        self.store, self.cache = store, cache
        self.device = pool.device
        self.experts_per_layer = [source.layout.num_experts for source in store.layers]
        self.observers: list[RouteObserver] = []
        self.turns = Turns()  # of the model's passes
        self.step_of: Callable[[], Any] = lambda: None  # returns `step`
        self.most_tokens: int | None = None  # of which experts run at once; more come part by part
        self.plan: dict[str, Any] | Contract | None = None  # bytes by use, as divided while loading
        self.parallel: Any = None  # the model's ExpertParallel, where its experts are spread over processes
        self.prediction, self.governor, self._budget_bytes = prediction, governor, expert_budget_bytes
        self._slot_bytes, self._stats = pool.stride, Stats()
        self._unit_bytes = pool.stride if cache.sizes is None else PAGE_BYTES  # of one unit of the cache's limit
        self._caches = [cache] if host is None else [cache, host.cache]
        self._transfers = Transfers(store, pool, streams, host=host, num_threads=num_threads, sampler=sampler)
        self.computes_on_host = misses is not None  # some of the device's experts, on the CPU
        assert misses is None or host is not None, "without a host tier no expert lies anywhere else"
        self._host_compute = None if misses is None or host is None else HostCompute(misses, host, self._transfers)
        prefetcher = None if prediction is None else prediction.prefetcher
        self.resident_table = ResidentTable(cache, pool, self._stats, self.experts_per_layer)
        self.trusting: Trusting | None = None  # decode steps that ask for nothing, where kernels find experts
        if self.device.type != "cpu":
            self.trusting = Trusting(DeviceTable(cache, pool, self.experts_per_layer), self._stats)
        self.downloads = Downloads(streams, is_pinned=self.device.type != "cpu")
        self._residency = Residency(cache, pool, streams, self._transfers, prefetcher, self._stats)
        self.expert_fetch = ExpertFetch(self._residency, self._host_compute, prediction, self._stats)
        self._torn = False  # whether an interrupt may have left the bookkeeping half done
        self._lock = threading.RLock()
        self._records = records_of([source.layout for source in store.layers])
        self._parts = Parts(self._transfers, store, [pool] if host is None else [pool, host.pool])
        self._at_collection = weakref.finalize(self, self._parts.collect)
        self.closed = False
        self._refusal: MoeflowError = ClosedModelError("the model was closed: load it again to use it.")
        tell_of_forks(self)

    def __enter__(self) -> "ExpertRuntime":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a loaded model's experts, threads and files can be neither copied nor pickled. Call load_moe again, in "
            "the process that needs the model."
        )

    @property
    def step(self) -> Any:
        """The model's StepDecoding, which the model owns; None where its decode steps never run natively."""
        return self.step_of()

    @property
    def predictor(self) -> Predictor | None:
        """The predictor, or None."""
        return None if self.prediction is None else self.prediction.predictor

    @property
    def predicting(self) -> bool:
        """Whether the predictor wants the routes of the pass under way."""
        return self.prediction is not None and self.prediction.watching

    def records(self, layer: int) -> list[RecordLayout]:
        """Return how each expert of a layer is stored; equal records are one object."""
        return self._records[layer]

    def close(self) -> None:
        """Stop the threads, close the files, release every slot. The model cannot run afterwards.

        An interrupt in here leaves the rest to the next call, or to garbage collection.
        """
        with self._lock:
            self.closed = True
            if self._at_collection.alive:
                self._parts.release()
                self._at_collection.detach()
            closing: list[Any] = [*self.observers, *filter(None, [self.trusting])]
            for one in closing:
                one.close()

    def refuse(self, error: MoeflowError) -> None:
        """Raise this error in every later call; close() goes on releasing what there is."""
        self.closed, self._refusal = True, error

    def after_fork(self) -> None:
        """Begin anew in the child of a fork; on a GPU, refuse from now on, for CUDA does not live through it."""
        self._lock = threading.RLock()
        self.turns.renew()
        if self.closed:
            return
        self.store.after_fork()
        if self.device.type != "cpu":
            self._at_collection.detach()  # what it would release is the parent's
            told = (
                f"the model was loaded on {self.device} by the process that forked this one, and CUDA cannot be used "
                "in the child of a fork. Load the model in this process, started by spawn, or give device='cpu'."
            )
            return self.refuse(ForkedProcessError(told))
        self._transfers.after_fork()
        # Of a pass in another thread, and of prefetches, nobody waits for the end here: the next call clears up.
        self._torn = self._torn or len(self._transfers) > 0
        torch.set_num_threads(1)  # the others did not come along, and OpenMP would wait for them for ever

    def begin_pass(self, begun: "ForwardPass") -> None:
        """Begin a pass that transformers describes, and tell the observers; raises as `begin_forward` and a plan do."""
        if self.plan is not None and not isinstance(self.plan, dict):
            self.plan.check_pass(begun)
        self.begin_forward(*begun[:2], continues=begun.continues, token_ids=begun.token_ids)
        for observer in self.observers:
            observer.begin_pass(begun)

    def begin_forward(
        self, num_sequences: int, num_positions: int, *, continues: bool, token_ids: torch.Tensor | None = None
    ) -> None:
        """Begin a pass over [num_sequences, num_positions] new tokens.

        Args:
            num_sequences: in the pass.
            num_positions: new ones of each sequence, padding included.
            continues: whether earlier positions lie in a KV cache, which makes the pass decode.
            token_ids: the tokens, [num_sequences, num_positions], where they are known.

        Raises:
            ClosedModelError: close() was called.
            ForkedProcessError: the model is on a GPU and this process is a fork of its own.
        """
        with self._lock:
            if self.closed:
                raise self._refusal
            self._stats.begin_forward(num_sequences, num_positions, continues=continues)
            if self.governor is None and self.prediction is None:
                return
            self._mend()
            self._torn = True
            if self.governor is not None:
                self._residency.set_limit(self.governor.slots(self.cache.used, self.cache.limit, now=not continues))
            if self.prediction is not None:
                self.prediction.begin_forward(token_ids, num_sequences, num_positions, continues, self._stats.now)
                self._residency.prefetch()
            self._torn = False

    def fetch(
        self,
        layer: int,
        experts: list[int],
        router_output: RouterOutput | None = None,
        num_tokens: list[int] | None = None,
        tokens_on_host: HostTokens | None = None,
        *,
        together: bool = False,
    ) -> Generator[list[Resident], None, None]:
        """Yield every demanded expert once, where it lies: the resident ones together, then others as they arrive.

        Where experts wait for a slot, each resident one is yielded alone, so that its slot is free as soon as possible.
        Experts that `MissSplit` gives to the CPU are yielded in the host tier, behind the resident ones: the device and
        the copies work beside them. A yielded list is valid until the next is asked for. Closing the iterator early is
        safe at any point: copies still in flight end by themselves and become resident.

        Args:
            layer: number among the MoE layers.
            experts: distinct expert numbers; may be more than there are slots.
            router_output: what the router chose for each token, for the predictor.
            num_tokens: tokens that go to each of the experts; one each when None.
            tokens_on_host: sent and awaited where an expert is yielded in host memory.
            together: yield all at once when the last has arrived, where there are slots for all.

        Raises:
            ExpertReadError: an expert could not be read. The runtime stays usable.
            ClosedModelError: close() was called.
            ForkedProcessError: the model is on a GPU and this process is a fork of its own.
        """
        with self._lock:
            if self.closed:
                raise self._refusal
            self._mend()
            self._torn = True  # until this call has put everything back
            try:
                keys = [ExpertKey(layer, expert) for expert in experts]
                tokens_of = dict(zip(keys, num_tokens or [1] * len(keys), strict=True))
                records, fetch = self._records[layer], self.expert_fetch.fetch
                yield from fetch(layer, records, tokens_of, router_output, tokens_on_host, together)
            except (GeneratorExit, ExpertReadError):
                self._torn = False
                raise
            self._torn = False

    @contextmanager
    def holding(self) -> Iterator[bool]:
        """Hold every resident expert where it lies, for code that runs several layers without asking for each.

        Yields:
            Whether layers may go unasked for: not while their demands are predicted, observed or shared out.

        Raises:
            ClosedModelError: close() was called.
            ForkedProcessError: the model is on a GPU and this process is a fork of its own.
        """
        with self._lock:
            if self.closed:
                raise self._refusal
            self._mend()
            yield not (self.predicting or self.observers or self._host_compute)

    @contextmanager
    def changing(self) -> Iterator[Residency]:
        """Hold the experts for code that moves and uses them itself; an error in it leaves nothing resident."""
        with self.holding():
            self._torn = True
            yield self._residency
            self._torn = False

    @contextmanager
    def unwatched(self, *, counts: bool = False) -> Iterator[None]:
        """Run passes of moeflow's own between two of the user's: not predicted, not observed, counted where asked."""
        with self._lock:
            observers, prediction, counted = self.observers, self.prediction, None if counts else self._stats.copy()
            self.observers, self.prediction = [], None
            try:
                with nullcontext() if prediction is None else prediction.paused():
                    yield
            finally:
                self.observers, self.prediction = observers, prediction
                self._stats.restore(counted)

    def stats(self) -> dict[str, Any]:
        """Return the counters since loading or the last reset_stats(), with units in the names."""
        return self.snapshot().as_dict()

    def snapshot(self) -> RuntimeStats:
        """Return what stats() says as numbers: the difference of two snapshots is what happened between them."""
        with self._lock:
            memory = memory_stats(self._caches, (self._unit_bytes, self._slot_bytes), self.experts_per_layer)
            memory["expert_budget_bytes"] = self._budget_bytes or self.cache.limit * self._unit_bytes
            memory |= {"staging_bytes": self.store.staging_bytes} | (self.governor.stats() if self.governor else {})
            return RuntimeStats(
                device=str(self.device),
                policy=self.cache.policy,
                slots=min(self.cache.limit, self.cache.num_slots),
                num_experts=sum(self.experts_per_layer),
                prefill=self._stats.prefill.copy(),
                decode=self._stats.decode.copy(),
                memory=memory,
                plan=self.plan,
                miss=None if self._host_compute is None else self._host_compute.as_dict(),
                prediction=None if self.prediction is None else self.prediction.stats(),
                step=(self.step or self.trusting or PythonSteps()).as_dict(),
                io=ReadStats(**self.store.stats(), threads=self._transfers.num_threads),
                integrity=None if (sampler := self._transfers.sampler) is None else sampler.as_dict(),
                speculation=None if (drafts := getattr(self.step, "drafts", None)) is None else drafts.stats(),
            )

    def reset_stats(self) -> None:
        """Reset the counters; resident experts stay."""
        with self._lock:
            self._stats.reset()
            if self.prediction is not None:
                self.prediction.reset_stats()
            for cache in self._caches:
                cache.peak_used = cache.used

    def check_integrity(self) -> None:
        """Assert the invariants of the residency maps and of the copies in flight."""
        with self._lock:
            self._mend()
            self._residency.settle_ended()
            for cache in self._caches:
                cache.check_integrity()
                assert len(self._transfers) or not cache.num_pinned, "a slot is pinned while nothing runs"

    def _mend(self) -> None:
        """Reset to nothing resident if an interrupt struck in the middle of the bookkeeping."""
        if self._torn:
            self._residency.clear()
            if self.prediction is not None:
                self.prediction.clear()
            self._torn = False
