"""What a decode step asks of the driver and what the card does in it, counted by torch's profiler."""

from collections.abc import Iterable
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cuCtxSynchronize")
COPIES = ("cudaMemcpy", "cuMemcpy")


def profile_steps(model: Any, cache: Any, token: Any, num_steps: int, device: str) -> dict[str, Any]:
    """Run decode steps under the profiler; return counts a step, and the link's bytes a second while it copied.

    Args:
        model: to run.
        cache: keys and values of what came before.
        token: [1, 1], the next one.
        num_steps: to run; each takes the likeliest token, without a look from the host.
        device: the model's.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bench.device import synchronize

    activities = [ProfilerActivity.CPU] + ([] if device == "cpu" else [ProfilerActivity.CUDA])
    before = model.moeflow.snapshot().decode
    synchronize(device)
    with torch.no_grad(), profile(activities=activities) as profiler:
        for _ in range(num_steps):
            result = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = result.logits[:, -1:].argmax(-1)
    synchronize(device)
    copied = (model.moeflow.snapshot().decode - before).bytes_from_host
    return summarise(profiler.key_averages(), num_steps, copied)


def summarise(averages: Iterable[Any], num_steps: int, copied_bytes: int) -> dict[str, Any]:
    """Return the figures of some profiler averages (`key`, `count`, `self_device_time_total` in microseconds)."""
    counts = {"launches": 0, "syncs": 0, "copies": 0}
    to_card_us = 0.0
    for one in averages:
        for kind, names in (("launches", LAUNCHES), ("syncs", SYNCS), ("copies", COPIES)):
            counts[kind] += one.count if one.key.startswith(names) else 0
        if one.key.startswith("Memcpy HtoD"):
            to_card_us += one.self_device_time_total
    figures: dict[str, Any] = {f"{kind}_a_step": count / num_steps for kind, count in counts.items()}
    figures["streaming_gb_per_s"] = copied_bytes / to_card_us / 1e3 if to_card_us else None
    return figures
