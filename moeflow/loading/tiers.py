"""Builds the tiers of a model: slots on the device, pinned host memory and the store on disk, behind one runtime.

Knows budgets and what the machine has free. Knows nothing of modules or forward passes.
"""

from pathlib import Path
from typing import NamedTuple

from moeflow import hardware
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES
from moeflow.errors import BudgetError
from moeflow.fit.memory import READ_THREADS, auto_budget
from moeflow.hf.loaded.mtp_layers import FoundMtp
from moeflow.hf.passes.residual import ResidualTap
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.device_plan import DevicePlan
from moeflow.loading.gpu import Gpu
from moeflow.loading.options import LoadOptions
from moeflow.memory_size import parse_bytes, parse_kv_memory, parse_memory
from moeflow.offload.arena.device_governor import DeviceGovernor, DeviceMeter
from moeflow.offload.arena.governor import Governor
from moeflow.offload.arena.memory_governor import MemoryGovernor
from moeflow.offload.arena.segmented_pool import SegmentedPool
from moeflow.offload.arena.shared_budget import SharedBudget
from moeflow.offload.copies.slot_sampler import SlotSampler
from moeflow.offload.host_tier import CudaRegistrar, HostTier, PinnedPool
from moeflow.offload.prediction_loop import PredictionLoop
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import CudaStreams, HostStreams, Streams
from moeflow.policy.cache import ExpertCache
from moeflow.policy.miss_split import MissSplit
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger
from moeflow.predictors.protocol import Predictor

_RESERVE_POSITIONS = 2048  # of key-value cache


class Experts(NamedTuple):
    """The routed experts of a model on disk.

    Args:
        files: the files that piece tables number.
        stamps: of the files when their headers were read.
        layers: [num_layers], where each expert's bytes come from; those of multi-token prediction at the end.
        size: the memory that they take.
        mtp: the layers of multi-token prediction; None where drafts ask for none.
    """

    files: list[Path]
    stamps: list[FileStamp]
    layers: list[LayerSource]
    size: ExpertsSize
    mtp: FoundMtp | None = None

    @property
    def num_own(self) -> int:
        """How many layers are the model's own."""
        return len(self.layers) - (0 if self.mtp is None else len(self.mtp.sources))


def build_runtime(
    experts: Experts,
    options: LoadOptions,
    predictor: Predictor | None,
    tap: ResidualTap | None,
    *,
    bytes_per_position: int,
    gpu: Gpu | None = None,
) -> ExpertRuntime:
    """Build the runtime of a model.

    Args:
        experts: on disk.
        options: of load_moe; `policy="auto"` is "forecast" where there is a predictor, else "lfru".
        predictor: predicts what to prefetch; None for demand only.
        tap: the residual stream, for a predictor that asks for it.
        bytes_per_position: of key-value cache, which "auto" leaves room for.
        gpu: that the model is on, measured; None on the CPU.

    Raises:
        BudgetError: a budget is below the minimum, or too little memory is free.
    """
    size, device = experts.size, options.torch_device
    policy = options.policy
    if policy == "auto":
        policy = "lfru" if predictor is None else "forecast"
    plan: DevicePlan | None = None
    if gpu is not None:
        plan = gpu.divide(size, experts.layers[0].layout, options)
    budget = _budget_bytes(experts, options, bytes_per_position) if plan is None else plan.expert_bytes
    num_slots = size.slots_for(budget)
    # The cache counts slots, or the pages of experts that differ in size.
    unit, limit = (size.slot_bytes, num_slots) if size.pages is None else (PAGE_BYTES, budget // PAGE_BYTES)
    governor: Governor | None = None
    if options.memory != "auto":
        governor = SharedBudget(budget, unit, size.min_bytes // unit, min(limit, size.all_bytes // unit))
    elif options.expert_memory == "auto" and device.type == "cpu":
        # The pool may grow later: its pages are taken from the system only as experts arrive.
        most = min(max(budget, hardware.memory_limit_bytes()), size.all_bytes)
        num_slots = size.slots_for(most)
        governor = MemoryGovernor(unit, size.min_bytes // unit, most // unit)
    num_transient = size.num_experts_per_tok + 1
    streams: Streams = HostStreams()
    host: HostTier | None = None
    opened: list[SlotPool | ExpertStore] = []
    try:
        opened.append(pool := _slots(size, options, num_slots))
        if device.type == "cuda":
            streams = CudaStreams(device)
            host = _host_tier(size, options, policy, num_transient, num_slots)
            opened.append(host.pool)
        if plan is not None and options.expert_memory == "auto" and isinstance(pool, SegmentedPool):
            governor = DeviceGovernor(
                pool,
                size.min_slots,
                measure=DeviceMeter(pool).measure,
                pass_bytes=plan.reserved_bytes - plan.key_value_bytes,
                key_value_bytes=plan.key_value_bytes,
            )
        cache = ExpertCache(pool.num_slots, policy, num_transient=num_transient, sizes=size.pages)
        cache.close(pool.closed_slots())
        cache.set_limit(limit)
        opened.append(store := ExpertStore(experts.files, experts.layers, stamps=experts.stamps))
        runtime = ExpertRuntime(
            store,
            pool,
            cache,
            streams,
            host=host,
            num_threads=READ_THREADS,
            expert_budget_bytes=None if governor else budget,
            governor=governor,
            prediction=_prediction(experts, predictor, tap, cache),
            misses=MissSplit() if options.miss == "cheapest" else None,
            sampler=SlotSampler(store, pool, cache, streams) if options.integrity == "sample" else None,
        )
        if options.kv_memory != "auto":
            runtime.plan = {"key_value_bytes": parse_kv_memory(options.kv_memory)}
        if gpu is not None and plan is not None:
            runtime.plan = gpu.describe(plan)
            runtime.most_tokens = plan.prefill_tokens if options.expert_memory == "auto" else None
        return runtime
    except BaseException:
        for part in opened:
            part.close()
        raise


def _slots(size: ExpertsSize, options: LoadOptions, num_slots: int) -> SlotPool:
    """Build the device's slots. On a GPU, "auto" may give experts memory later that they do not get now."""
    device = options.torch_device
    if device.type == "cpu":
        return SlotPool(num_slots, size.slot_bytes, device)
    most = size.num_experts if options.expert_memory == "auto" else num_slots
    return SegmentedPool(most, size.slot_bytes, device, num_open=num_slots)


def _budget_bytes(experts: Experts, options: LoadOptions, bytes_per_position: int) -> int:
    """Return the bytes that experts may take, by the user's word or by what is free in host memory."""
    size = experts.size
    if options.memory != "auto":
        return parse_bytes(options.memory, name="memory")
    if options.expert_memory != "auto":
        return parse_memory(options.expert_memory, name="expert_memory", whole_bytes=size.all_bytes)
    key_values = _RESERVE_POSITIONS * bytes_per_position
    if options.kv_memory != "auto":
        key_values = parse_kv_memory(options.kv_memory)
    free = hardware.available_memory_bytes()
    budget, reserve = auto_budget(
        free, slot_bytes=size.slot_bytes, all_bytes=size.all_bytes, key_value_bytes=key_values
    )
    if budget < size.min_bytes:
        raise BudgetError(
            f"{free:,} bytes of memory are free here, {reserve:,} of them are kept for activations and the key-value "
            f"cache. The experts need at least {size.min_bytes:,} bytes ({size.min_slots} slots). Free memory, or set "
            "expert_memory yourself."
        )
    return budget


def _prediction(
    experts: Experts, predictor: Predictor | None, tap: ResidualTap | None, cache: ExpertCache
) -> PredictionLoop | None:
    if predictor is None:
        return None
    ledger = PrefetchLedger(len(experts.layers), expert_bytes=experts.size.slot_bytes)
    return PredictionLoop(Prefetcher(predictor, cache, ledger, num_layers=len(experts.layers)), tap=tap)


def _host_tier(size: ExpertsSize, options: LoadOptions, policy: str, num_transient: int, num_slots: int) -> HostTier:
    """Build the pinned tier beside this many slots on the device."""
    least = min(2 * READ_THREADS, size.num_experts)
    wanted = size.host_slots_for(
        options.host_memory,
        free_bytes=hardware.available_memory_bytes(),
        reads_in_flight=least,
        all_on_device=num_slots == size.num_experts,
    )
    pool = PinnedPool(wanted, size.slot_bytes, CudaRegistrar(options.torch_device), least_slots=least)
    policy = "lfru" if policy == "forecast" else policy
    return HostTier(pool, ExpertCache(pool.num_slots, policy, num_transient=num_transient))
