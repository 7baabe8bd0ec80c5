"""load_moe(): loads a transformers model whose experts live in tiers instead of in its modules.

Knows the order of the steps. Knows nothing of how each is done.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moeflow.checkpoint.float_source import float_sources
from moeflow.checkpoint.lossless_source import LEAVE_OUT, any_lossless, lossless_sources
from moeflow.checkpoint.quantized_source import quantize_sources
from moeflow.errors import ConfigError
from moeflow.fit.contract import Contract, plan_of
from moeflow.fit.formats import kernel_of
from moeflow.fit.memory import staging_bytes
from moeflow.fit.plan import Plan
from moeflow.hf import experts_interface, pretrained
from moeflow.hf.dense_kernels import speed_up_dense
from moeflow.hf.loaded.mtp_layers import FoundMtp, find_mtp, load_mtp, refused_mtp, wants_mtp
from moeflow.hf.model_folder import ModelFolder
from moeflow.hf.passes import forward
from moeflow.hf.passes.generating.candidates import draft_lookups
from moeflow.hf.passes.lossless_dense import compress_dense
from moeflow.hf.passes.residual import ResidualTap
from moeflow.loading.attach import attach_mtp, attach_runtime, capture_steps, prune_experts
from moeflow.loading.budget import ExpertsSize, check_shared
from moeflow.loading.generate_drafts import GenerateDrafts
from moeflow.loading.gpu import Gpu
from moeflow.loading.gpu_memory import GpuMemory, dense_weights_on
from moeflow.loading.hf_options import refuse_unknown, taken_hf_options
from moeflow.loading.live_predictor import build_predictor
from moeflow.loading.options import LoadOptions
from moeflow.loading.tiers import Experts, build_runtime
from moeflow.memory_size import MemorySize, parse_bytes, parse_memory
from moeflow.moe.choose_compute import can_use_triton, computes_lossless, tell_slow_blocks
from moeflow.offload.trusting.capture import CudaCapture
from moeflow.step.decoding import StepDecoding
from moeflow.trace.recorder import attach_recorder


def load_moe(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: MemorySize = "auto",
    expert_memory: MemorySize = "auto",
    host_memory: MemorySize = "auto",
    kv_memory: MemorySize = "auto",
    quantization: str | None = None,
    policy: str = "auto",
    predictor: str | Path | None = "auto",
    miss: str = "copy",
    prune: float = 0.0,
    step: str = "auto",
    cuda_graphs: bool = False,
    plan: str | Path | Plan | None = None,
    integrity: str = "off",
    speculation: str | Mapping[str, Any] | None = "auto",
    kv_format: str = "auto",
    kv_policy: str | Mapping[str, Any] | None = None,
    trace: str | Path | None = None,
    **hf_kwargs: Any,
) -> Any:
    """Load a mixture-of-experts model with its routed experts left on disk until a token needs them.

    Args:
        model: a hub id, a checkpoint folder, a folder written by `moeflow pack`, or a GGUF file.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        memory: bytes of experts and of engines' keys and values together: a number, "12GiB", or "auto" (each has a
            budget of its own). Experts take what keys and values leave: they leave before a conversation needs the
            room, and come back when it is dropped. In place of `expert_memory` and `kv_memory`; on the CPU alone.
        expert_memory: bytes the experts may take on the device: a number, "6GiB", "600MB", "25%" of all experts, or
            "auto". On the CPU "auto" starts low and then follows what is free inside the process's own memory limit, so
            that the process is not paged out; on a GPU it takes what is free after the rest of the model.
        host_memory: bytes of pinned host memory between disk and GPU, written the same way; CUDA only.
        kv_memory: bytes that expert_memory="auto" leaves to keys and values: a number, "2GiB", or "auto" (2048
            positions on the CPU, 4096 on a GPU). Room for activations on a GPU is measured by a pass over as many
            positions, and Engine(kv_memory="auto") takes as many bytes.
        quantization: a weight format the experts are rounded to as they are read: "int8", "int4", "int3", "int2",
            "int1", or with a group size, "int4-g32". Lossy. Every read still takes the unquantised bytes from the disk:
            where not all experts fit, write them once with `moeflow quantize`, and load that folder. Or "lossless":
            bfloat16 experts take about three quarters of their bytes, and every bit stays; `moeflow pack` writes them
            so once, and such a folder needs no option.
        policy: which expert leaves when a slot is needed: "lru", "lfu", "lfru" (frequency / (age + 1)), "static",
            "forecast" (the one whose slot is worth the least by prediction), or "auto" ("forecast" where there is a
            predictor, else "lfru").
        predictor: what predicts the experts needed next, so that they are fetched in time: "auto" (the coming layers'
            own routers, asked early), "lookahead", "markov", "popularity", "ensemble", a file written by `moeflow
            predictor train`, or None. It never changes a bit of the output, and switches itself off where it does not
            pay.
        miss: what becomes of an expert that is not on the GPU: "copy" (it comes to the GPU), or "cheapest" (of the
            experts that a layer misses and that lie in host memory, the CPU computes some in place while others are
            copied, split by bandwidths measured while both run). "cheapest" is for CUDA only, and lossy: the CPU's last
            bits differ from the GPU's, so that the output depends on timing. It is not yet measured on a GPU.
        prune: share of the experts behind each token's first that are left out, those the router hardly wants, by
            thresholds found on calibration text while loading (0.5 skips half of them). Lossy, so 0 by default.
        step: what runs the decode steps of one sequence in generate(): "auto" (on the CPU, a program captured from the
            model at its first step, which takes several seconds once a model, kept on disk, and run natively from one
            missing expert to the next; steps that it cannot run stay the model's own), or "python" (the model's own
            code). Last bits differ between the two.
        cuda_graphs: capture the decode steps of generate() as CUDA graphs, once a generation, and replay them: whole
            while no expert is missed, else in pieces between the layers' experts. Keys and values stay where they are,
            with room for up to twice the positions, so that last bits differ from those without; they are the same at
            every budget. CUDA only; not yet measured on a GPU.
        plan: a plan of `moeflow.fit`, or the file that `moeflow fit -o` wrote: how much every part of the process may
            take. A plan of another model or machine, or one that was changed, is refused, and so is what goes over one
            of its lines, by the line's name. It stands in place of `device`, `expert_memory` and `kv_memory`.
        integrity: "sample": after some of the copies of experts (one of 32, drawn with a seed, and at most 4 MB a
            second) the slot is compared with its source by checksum, in a thread of its own. What differs is named in a
            warning and counted in stats()["integrity"]. The output stays the same.
        speculation: drafts in engines on this model (chat, serve, batch): "auto" (steps also compute tokens that may
            come next, where that pays by the clock; so do greedy calls of generate(prompt_lookup_num_tokens=)), "off"
            or None, or a dict of an engine's options. The tokens of answers are the same.
        kv_format: in which engines on this model keep keys and values: "auto" (the model's dtype), "int8" (a little
            more than half of bfloat16's bytes), or "int4" (values in int4, keys in int8: two fifths). Both are lossy.
        kv_policy: what engines see of long texts: None (all), "sinks", "heavy_hitters", "pages" (docs/kv_policies.md),
            or a dict of a name and its sizes, also written "sinks:sinks=4,window=1024". Lossy.
        trace: a file to record into which experts every token is routed to; appended to where it exists.
        **hf_kwargs: fields of the config, and of the options of transformers' from_pretrained those about the download,
            `gguf_file` (of the hub's repository or the folder, the GGUF file to load), `config` (beside a GGUF file, a
            folder or hub id too, whose config and tokenizer win over the file's own), `trust_remote_code`,
            `attn_implementation`, `generation_config`, `ignore_mismatched_sizes`, `disable_mmap` and
            `output_loading_info`. Others are refused, each with what to use instead.

    Returns:
        The transformers model, of the class that its config names, in eval mode, with `model.moeflow` (an
        `ExpertRuntime`): stats(), reset_stats(), close().

    Raises:
        ConfigError: an option is malformed, unknown or does not fit the machine.
        BudgetError: a budget is below the minimum, which the message names.
        UnsupportedModelError: a dense model, or a format this version does not read.
        CheckpointError: missing, truncated, corrupt or foreign weights.
        ModelSourceError: no such folder or hub id.
        TraceError: the trace is of another model, damaged, or cannot be written.
    """
    contract = None if plan is None else Contract(plan_of(plan))
    if contract is not None:
        device, expert_memory, kv_memory = contract.options(
            device=device, expert_memory=expert_memory, kv_memory=kv_memory
        )
    options = LoadOptions(
        device, dtype, memory, expert_memory, host_memory, kv_memory, quantization, policy, predictor, miss, prune,
        step, cuda_graphs, plan, integrity, speculation, kv_format, kv_policy, trace,
    )  # fmt: skip
    hf_options = taken_hf_options(hf_kwargs)
    want_info = hf_options.pop("output_loading_info", False)
    folder = ModelFolder.of_hf_options(model, hf_options)
    refuse_unknown(hf_options)
    if contract is not None:
        contract.check_model(folder.path)
    on_cpu = options.torch_device.type == "cpu"
    if not on_cpu:
        can_use_triton(options.torch_device)  # which tells before a long load why not
    placement = {} if on_cpu else {"device_map": {"": options.torch_device}}
    wanted = folder.dtype if options.torch_dtype == "auto" else options.torch_dtype
    with dense_weights_on(options.torch_device):
        loaded, info, experts = pretrained.load_without_experts(
            folder.checkpoint,
            folder.config,
            partial(_find_experts, folder, options, contract),
            weights=folder.dense_weights(wanted, keeps_blocks=on_cpu),
            dtype=wanted,
            **placement,
            **hf_options,
        )
    if folder.gguf is None:  # of a GGUF file they were read into memory, not mapped
        pretrained.own_dense_weights(loaded)
    if on_cpu:
        speed_up_dense(loaded)
    if on_cpu and any_lossless(experts.layers):
        compress_dense(loaded)
    mtp = None if experts.mtp is None else load_mtp(loaded, experts.mtp, folder.checkpoint)
    if contract is not None:
        contract.charge("dense", _dense_bytes(loaded) + (0 if mtp is None else mtp.num_bytes))
    bytes_per_position = forward.key_value_bytes_per_position(loaded)
    gpu = None if on_cpu else Gpu.of(loaded, GpuMemory(options.torch_device), options, bytes_per_position)
    own = experts.layers[: experts.num_own]
    predicting = build_predictor(predictor, loaded, own, experts.size.num_experts_per_tok)
    tap = ResidualTap(loaded) if predicting is not None and predicting.signal == "residual" else None
    runtime = build_runtime(experts, options, predicting, tap, bytes_per_position=bytes_per_position, gpu=gpu)
    if contract is not None:
        runtime.plan = contract
        contract.charge("experts", runtime.snapshot().memory["expert_budget_bytes"])
    try:
        attach_runtime(loaded, runtime)
        if mtp is not None:
            attach_mtp(loaded, mtp, runtime, experts.num_own)
        vars(loaded)["_moeflow_speculation"] = options.speculation
        vars(loaded)["_moeflow_kv_format"] = options.kv_format
        vars(loaded)["_moeflow_kv_policy"] = options.kv_policy
        if prune:
            prune_experts(loaded, runtime, folder.path, prune)
        if options.cuda_graphs:
            capture_steps(loaded, runtime, CudaCapture(options.torch_device))
        if options.step == "auto" and on_cpu:
            decoding = StepDecoding(loaded)
            if options.speculation == "auto":
                decoding.drafts = drafts = GenerateDrafts(runtime, experts.size.num_experts_per_tok)
                draft_lookups(loaded, drafts.begin)
        if trace is not None:
            attach_recorder(loaded, trace)
    except BaseException:
        runtime.close()
        raise
    return (loaded, info) if want_info else loaded


def _dense_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that are in memory, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _find_experts(
    folder: ModelFolder, options: LoadOptions, contract: Contract | None, empty: PreTrainedModel
) -> Experts:
    """Find the experts of an empty model, and refuse a budget that is too small for them."""
    stored = layers = folder.layers(empty)
    transposed = experts_interface.transposed(empty)
    mtp = _find_mtp(folder, options, empty) if wants_mtp(options.speculation) else None
    if mtp is not None:
        stored = layers = layers + mtp.sources
        transposed += mtp.transposed
    if options.weight_format is not None:
        formats = [[options.weight_format] * source.layout.num_experts for source in layers]
        layers = quantize_sources(layers, formats, transposed)
    if options.is_lossless:
        layers, why_not = lossless_sources(folder.expert_files, folder.expert_stamps, layers, transposed)
        if why_not:
            raise ConfigError(f"{why_not} {LEAVE_OUT}")
    if any_lossless(layers) and not computes_lossless(options.torch_device):
        layers = float_sources(stored)
    size = ExpertsSize.of(
        [source.layout for source in layers],
        experts_interface.num_experts_per_tok(empty),
        whole_slots=options.torch_device.type != "cpu",
    )
    if options.memory != "auto":
        forward.check_key_value_cache(empty)  # other states are not counted
        position_bytes = forward.key_value_bytes_per_position(empty)
        position_bytes += position_bytes // len(layers) // 2  # keys or values of a layer, while a slot is copied
        check_shared(parse_bytes(options.memory, name="memory"), size, position_bytes)
    if options.expert_memory != "auto":
        size.slots_for(parse_memory(options.expert_memory, name="expert_memory", whole_bytes=size.all_bytes))
    if contract is not None:
        contract.check_stored(kernel_of([source.layout for source in layers]))
        contract.charge("pinned", staging_bytes(size.slot_bytes))
    tell_slow_blocks({record for source in layers for record in source.layout.records}, options.torch_device)
    return Experts(folder.expert_files, folder.expert_stamps, layers, size, mtp)


def _find_mtp(folder: ModelFolder, options: LoadOptions, empty: PreTrainedModel) -> FoundMtp:
    """Find a model's layers of multi-token prediction, where they can be loaded."""
    if options.torch_device.type != "cpu":
        raise refused_mtp("they run on the CPU alone")
    if folder.gguf is not None or folder.packed:
        raise refused_mtp("they are read of checkpoints in safetensors, whose experts are not packed")
    return find_mtp(empty, folder.checkpoint)
