"""load_moe(): a transformers model whose experts live in the tiers instead of in the module."""

import copy
import weakref
from pathlib import Path
from typing import Any

import torch

from moeflow import hardware
from moeflow.calibration.pruning_thresholds import calibrate_pruning
from moeflow.calibration.windows import cut_windows
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.packed_file import PACKED_FILE, read_packed
from moeflow.checkpoint.quantized_source import quantize_sources, writable_format
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import PAGE_BYTES
from moeflow.errors import BudgetError, CheckpointError, ConfigError
from moeflow.hf import experts_interface, forward, pretrained
from moeflow.hf.dense_kernels import speed_up_dense
from moeflow.hf.expert_sources import map_experts, map_layouts
from moeflow.hf.residual import ResidualTap
from moeflow.loading.live_predictor import build_predictor
from moeflow.memory_size import ExpertsSize, MemorySize, parse_memory
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.host_tier import HostTier
from moeflow.offload.memory_governor import MemoryGovernor
from moeflow.offload.prediction_loop import PredictionLoop
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import CudaStreams, HostStreams
from moeflow.policy.cache import POLICIES, ExpertCache
from moeflow.policy.miss_split import MissSplit
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger
from moeflow.trace.recorder import attach_recorder

# What "auto" leaves at first to everything that is not an expert: tokenizer, kernels' code, activations, slack.
_RESERVE_BYTES = 192 << 20
_RESERVE_POSITIONS = 2048  # of key-value cache
_READ_THREADS = 4
_PRUNING_TOKENS = 2048  # on which thresholds are found
_MISS = ("copy", "cheapest")
_REFUSED = {
    "device_map": "give device= instead: the dense weights go to one device",
    "quantization_config": "a quantised checkpoint is read as it is; quantization= quantises another's experts",
    "experts_implementation": "load_moe is an experts implementation itself",
    "state_dict": "weights are read from the checkpoint only",
    "gguf_file": "GGUF checkpoints are not supported: use safetensors",
    "variant": "experts and dense weights would come from different files",
    "subfolder": "give that folder as the model",
    "torch_dtype": "it is called dtype",
    "key_mapping": "experts are found by transformers' own mapping",
}
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load_moe(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    expert_memory: MemorySize = "auto",
    host_memory: MemorySize = "auto",
    quantization: str | None = None,
    policy: str = "auto",
    predictor: str | Path | None = "auto",
    miss: str = "copy",
    prune: float = 0.0,
    compile: bool = False,
    trace: str | Path | None = None,
    **hf_kwargs: Any,
):
    """Load a mixture-of-experts model with its routed experts left on disk until a token needs them.

    Args:
        model: a hub id, a checkpoint folder, or a folder written by `moeflow pack`.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        expert_memory: bytes the experts may take on the device: a number, "6GiB", "600MB", "25%" of all experts, or
            "auto" (all that is free after the rest of the model, inside the process's own memory limit).
        host_memory: bytes of pinned host memory between disk and GPU, written the same way; CUDA only.
        quantization: a weight format the experts are rounded to as they are read: "int8", "int4", "int3", "int2", or
            with a group size, "int4-g32". Lossy. Every read still takes the unquantised bytes from the disk: where not
            all experts fit, write them once with `moeflow quantize`, and load that folder.
        policy: which expert goes when a slot is needed: "lru", "lfu", "lfru", "static", "forecast" (the one whose slot
            is worth the least by prediction), or "auto" ("forecast" where there is a predictor, else "lfru").
        predictor: who says which experts are needed next: "auto", a name, a file written by `moeflow predictor
            train`, or None. It never changes a bit of the output, and switches itself off where it does not pay.
        miss: what becomes of an expert that is not on the GPU: "copy" (it comes to the GPU), or "cheapest" (where it
            lies in host memory, the CPU may compute it there while others are copied, as is foreseen to end soonest).
            "cheapest" is for CUDA only, and lossy: the CPU's last bits differ from the GPU's, so that the output
            depends on timing. It is not yet measured on a GPU.
        prune: share of the experts behind each token's first that are left out, those the router hardly wants, by
            thresholds found on calibration text while loading (0.5 skips half of them). Lossy, so 0 by default.
        compile: let generate() run its decode steps through torch.compile, with a static key-value cache: the first
            call takes about a minute longer, the others are faster. Last bits differ from those without it.
        trace: a file to record into which experts every token is routed to; appended to where it exists.
        **hf_kwargs: passed to transformers' from_pretrained.

    Returns:
        The transformers model in eval mode, with `model.moeflow` (an `ExpertRuntime`): stats(), reset_stats(), close().

    Raises:
        ConfigError: an option is malformed, unknown or does not fit the machine.
        BudgetError: a budget is below the minimum, which the message names.
        UnsupportedModelError: a dense model, or a format this version does not read.
        CheckpointError: missing, truncated, corrupt or foreign weights.
        ModelSourceError: no such folder or hub id.
        TraceError: the trace is of another model, damaged, or cannot be written.
    """
    device = _resolve_device(device)
    if policy not in ("auto", *POLICIES):
        raise ConfigError(f"policy={policy!r} is unknown. Allowed: auto, {', '.join(POLICIES)}.")
    if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 <= prune <= 1:
        raise ConfigError(f"prune={prune!r} is not a share. Give 0 (leave out nothing) to 1.")
    if miss not in _MISS:
        raise ConfigError(f"miss={miss!r} is unknown. Allowed: {', '.join(_MISS)}.")
    if miss != "copy" and device.type == "cpu":
        raise ConfigError(
            f"miss={miss!r} chooses between copying an expert to the GPU and computing it in host memory, and this "
            'model runs on the CPU, where both are one. Leave miss="copy".'
        )
    if quantization is not None:
        quantization = writable_format(quantization).name
    for name, remedy in _REFUSED.items():
        if hf_kwargs.get(name) is not None:
            raise ConfigError(f"load_moe does not take {name}: {remedy}.")
    if device.type == "cpu" and host_memory != "auto":
        raise ConfigError(
            f"host_memory={host_memory!r} is the tier between the disk and a GPU, and this model runs on the CPU. "
            "Put the memory into expert_memory."
        )
    for name, value in (("expert_memory", expert_memory), ("host_memory", host_memory)):
        if value != "auto":
            parse_memory(value, name=name, whole_bytes=0)

    want_info = hf_kwargs.pop("output_loading_info", False)
    folder = pretrained.resolve_folder(model, **{name: hf_kwargs[name] for name in _HUB_OPTIONS if name in hf_kwargs})
    config = hf_kwargs.pop("config", None)
    if config is None or isinstance(config, (str, Path)):
        config = pretrained.load_config(
            Path(config or folder), **{name: hf_kwargs[name] for name in ("trust_remote_code",) if name in hf_kwargs}
        )
    config = copy.deepcopy(config)  # the caller's stays as it is
    for name in [name for name in hf_kwargs if name in config.to_dict()]:  # as from_pretrained does
        setattr(config, name, hf_kwargs.pop(name))
    checkpoint = open_checkpoint(folder)
    plan, packed = _Plan(), (folder / PACKED_FILE).is_file()

    def on_skeleton(empty):
        if packed:
            plan.layers = read_packed(folder, map_layouts(empty))
        else:
            plan.layers = map_experts(empty, checkpoint.tensors)
        if quantization is not None:
            formats = [[quantization] * source.layout.num_experts for source in plan.layers]
            plan.layers = quantize_sources(plan.layers, formats, experts_interface.transposed(empty))
        plan.size = ExpertsSize.of(
            [source.layout for source in plan.layers],
            experts_interface.num_experts_per_tok(empty),
            whole_slots=device.type != "cpu",
        )
        if expert_memory != "auto":  # refuse before anything large is read
            plan.size.slots_for(parse_memory(expert_memory, name="expert_memory", whole_bytes=plan.size.all_bytes))
        pretrained.take_experts_off(empty)

    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    loaded, info = pretrained.load_without_experts(folder, config, on_skeleton, dtype=dtype, **placement, **hf_kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]}. "
            "The checkpoint is incomplete: download it again."
        )
    pretrained.own_dense_weights(loaded)
    if device.type == "cpu":
        speed_up_dense(loaded)
    files = [folder / PACKED_FILE] if packed else checkpoint.files
    predicting = build_predictor(predictor, loaded, plan.layers, plan.size.num_experts_per_tok)
    if policy == "auto":
        policy = "lfru" if predicting is None else "forecast"
    runtime = _build_runtime(files, plan, device, expert_memory, host_memory, policy, loaded, predicting, miss)
    _attach(loaded, runtime)
    if prune:
        _calibrate_pruning(loaded, folder, prune)
    if compile:
        forward.compile_decoding(loaded)
    if trace is not None:
        try:
            attach_recorder(loaded, trace)
        except BaseException:
            runtime.close()
            raise
    return (loaded, info) if want_info else loaded


class _Plan:
    """What the empty model told, carried out of transformers' loader."""

    layers: list[LayerSource]
    size: ExpertsSize


def _resolve_device(device) -> torch.device:
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f'device={device!r} is unknown. Allowed: "auto", "cpu", "cuda", "cuda:N".') from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError('device="cuda" was asked for, and torch sees no CUDA GPU. Use device="cpu" or "auto".')
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        raise ConfigError(f'device={str(device)!r} is not supported. Allowed: "auto", "cpu", "cuda", "cuda:N".')
    return device


def _build_runtime(files, plan, device, expert_memory, host_memory, policy, model, predictor, miss) -> ExpertRuntime:
    size, governor = plan.size, None
    reserve = (
        _RESERVE_BYTES
        + _READ_THREADS * size.slot_bytes
        + _RESERVE_POSITIONS * forward.key_value_bytes_per_position(model)
    )
    if expert_memory == "auto":
        free = hardware.available_memory_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        budget = min(max(free - reserve, 0), size.all_bytes)
        if budget < size.min_bytes:
            raise BudgetError(
                f"{free:,} bytes of memory are free here, {reserve:,} of them are kept for "
                "activations and the key-value cache. "
                f"The experts need at least {size.min_bytes:,} bytes ({size.min_slots} slots). Free memory, or set "
                "expert_memory yourself."
            )
    else:
        budget = parse_memory(expert_memory, name="expert_memory", whole_bytes=size.all_bytes)
    num_slots, streams, host = size.slots_for(budget), HostStreams(), None
    # What the cache counts in: slots, or the pages of experts that differ in size.
    unit, limit = (size.slot_bytes, num_slots) if size.pages is None else (PAGE_BYTES, budget // PAGE_BYTES)
    if expert_memory == "auto" and device.type == "cpu":
        # The pool may grow later: its pages are taken from the system only as experts arrive.
        most = min(max(budget, hardware.memory_limit_bytes()), size.all_bytes)
        num_slots = size.slots_for(most)
        governor = MemoryGovernor(unit, size.min_bytes // unit, most // unit)
    transient = size.num_experts_per_tok + 1
    pools = []
    try:
        pools.append(SlotPool(num_slots, size.slot_bytes, device))
        if device.type == "cuda":
            streams = CudaStreams(device)
            host = _host_tier(size, host_memory, policy, transient)
            pools.append(host.pool)
        cache = ExpertCache(num_slots, policy, num_transient=transient, sizes=size.pages)
        cache.set_limit(limit)
        store = ExpertStore(files, plan.layers)
        prediction = None
        if predictor is not None:
            ledger = PrefetchLedger(len(plan.layers), expert_bytes=size.slot_bytes)
            tap = ResidualTap(model) if predictor.signal == "residual" else None
            prediction = PredictionLoop(Prefetcher(predictor, cache, ledger), tap=tap)
        return ExpertRuntime(
            store,
            pools[0],
            cache,
            streams,
            host=host,
            num_threads=_READ_THREADS,
            expert_budget_bytes=None if governor else budget,
            governor=governor,
            prediction=prediction,
            misses=MissSplit() if miss == "cheapest" else None,
        )
    except BaseException:
        for pool in pools:
            pool.close()
        raise


def _host_tier(size: ExpertsSize, host_memory, policy, transient) -> HostTier:
    """Build the pinned tier: at least one slot for every read in flight."""
    floor = min(2 * _READ_THREADS, size.num_experts) * size.slot_bytes
    if host_memory == "auto":
        budget = max(min(size.all_bytes, int(0.6 * hardware.available_memory_bytes())), floor)
    else:
        budget = parse_memory(host_memory, name="host_memory", whole_bytes=size.all_bytes)
        if budget < floor:
            raise BudgetError(
                f"host_memory of {budget:,} bytes is below the minimum of {floor:,}: every read in "
                "flight passes through a "
                "pinned slot. Give at least that."
            )
    num_slots = min(budget // size.slot_bytes, size.num_experts)
    pool = SlotPool(num_slots, size.slot_bytes, torch.device("cpu"), pinned=True)
    return HostTier(pool, ExpertCache(num_slots, "lfru" if policy == "forecast" else policy, num_transient=transient))


def _calibrate_pruning(model, folder: Path, share: float) -> None:
    """Find every layer's thresholds on text that any machine has, and set them."""
    try:
        windows = cut_windows(pretrained.load_tokenizer(folder), None, _PRUNING_TOKENS)
        thresholds = calibrate_pruning(model, windows, skipped_share=share)
    except BaseException:
        model.moeflow.close()
        raise
    model.moeflow.reset_stats()
    for (_, module), threshold in zip(experts_interface.experts_modules(model), thresholds, strict=True):
        module._moeflow.use(before=[threshold.apply])


def _attach(model, runtime: ExpertRuntime) -> None:
    """Put the runtime behind the model's experts modules and count its passes."""
    for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):
        module._moeflow = OffloadedExperts(runtime, layer, module)
    model.moeflow = runtime
    counted = weakref.ref(runtime)

    @torch.compiler.disable
    def count_pass(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if ids is None and args:
            ids = args[0]
        if ids is not None:
            cache = forward.cache_of(kwargs)
            shape = ids.shape[0], ids.shape[1], ids if ids.dim() == 2 else None
            describe = getattr(cache, "describe_pass", None)  # a cache that holds many sequences knows better
            num_sequences, num_positions, tokens = shape if describe is None else describe(ids)
            continues = forward.continues_cache(kwargs, num_positions)
            counted().begin_forward(num_sequences, num_positions, continues=continues, token_ids=tokens)

    model.base_model.register_forward_pre_hook(count_pass, with_kwargs=True)

    def refuse_to_save(*args, **kwargs):
        raise ConfigError(
            "this model's experts are not in its modules, so save_pretrained would write a model "
            "without them. Copy the "
            "checkpoint folder instead, or use moeflow pack."
        )

    model.save_pretrained = refuse_to_save
