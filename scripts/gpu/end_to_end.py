"""A model's speed at one residency: tok/s, time to the first token, the link, what a step asks of the driver."""

import statistics
import time
from typing import Any

from bench.device import synchronize
from bench.token_times import TokenTimes
from gpu.calls import profile_steps
from gpu.models import draw_prompt, generate, loaded
from gpu.routes import ForcedRoutes, open_routes
from gpu.worker import Tell

PROMPT, TOKENS, REPEATS, PROFILED = 256, 64, 3, 8


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Measure one format, residency and kind of miss with each predictor."""
    options = {"expert_memory": job["share"], "miss": job["miss"], "cuda_graphs": job.get("cuda_graphs", False)}
    predictors = [*job["predictors"], "markov"] if job["routes"] and job["share"] != "100%" else job["predictors"]
    for predictor in predictors:
        begin = time.perf_counter()
        with loaded(job, job["format"], predictor=predictor, **options) as model:
            row = {
                "predictor": predictor or "none",
                "cuda_graphs": options["cuda_graphs"],
                "load_s": time.perf_counter() - begin,
            }
            tell({**row, **measure(model, job)})
            del model  # the next finds its memory free
    length, tokens, repeats = sizes(job)
    own = "the random routers' own"
    return {"routes": job["routes"] or own, "prompt": length, "tokens": tokens, "repeats": repeats}


def sizes(job: dict[str, Any]) -> tuple[int, int, int]:
    """Return the tokens of the prompt, of the answer, and how many answers are measured."""
    return (32, 6, 1) if job["dry"] else (PROMPT, TOKENS, REPEATS)


def measure(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Generate several times; the first brings the experts from the disk, the others are the figures."""
    length, tokens, repeats = sizes(job)
    forced = ForcedRoutes(model, open_routes(job), length + tokens + PROFILED) if job["routes"] else None
    prompt = draw_prompt(model, length)
    cold = timed(model, prompt, tokens)
    before = model.moeflow.snapshot()
    runs = [timed(model, prompt, tokens) for _ in range(repeats)]
    counted = model.moeflow.snapshot() - before
    decode_s = sum(one["decode_s"] for one in runs)
    steps = repeats * (tokens - 1)
    figures = {
        "tok_per_s": statistics.median((tokens - 1) / one["decode_s"] for one in runs),
        "ttft_s": statistics.median(one["ttft_s"] for one in runs),
        "ttft_cold_s": cold["ttft_s"],
        "hit_rate": counted.decode.hit_rate,
        "link_gb_per_s": counted.decode.bytes_from_host / decode_s / 1e9,
        "link_mb_a_step": counted.decode.bytes_from_host / steps / 1e6,
        "disk_mb_a_step": counted.decode.bytes_from_disk / steps / 1e6,
        "stall_ms_a_step": 1e3 * counted.decode.stall_s / steps,
        "predict_ms_a_step": 1e3 * counted.decode.predict_s / steps,
        "computed_on_host": counted.decode.decisions.computed_on_host,
        "same_tokens": len({tuple(one["tokens"]) for one in [cold, *runs]}) == 1,
        "predictor_on": None if counted.prediction is None else counted.prediction.on,
        "peak_bytes": peak_bytes(job["device"]),
        "host_bytes": counted.memory["host_bytes"],
        "replayed": counted.step.get("replayed", 0),
        "replayed_in_pieces": counted.step.get("pieces", {}).get("replayed", 0),
    }
    figures |= host_ms(model, prompt, 2 if job["dry"] else PROFILED, job["device"])
    if forced is not None:
        forced.remove()
    return figures


def timed(model: Any, prompt: Any, num_tokens: int) -> dict[str, Any]:
    """Generate; return the tokens, seconds to the first, and seconds from the first to the last."""
    clock = TokenTimes()
    synchronize(model.device)
    begin = time.perf_counter()
    tokens = generate(model, prompt, num_tokens, clock)  # the streamer gets tokens on the host: waited for
    first, last = clock.times[1], clock.times[-1]
    return {"tokens": tokens, "ttft_s": first - begin, "decode_s": last - first}


def host_ms(model: Any, prompt: Any, num_steps: int, device: str) -> dict[str, Any]:
    """Return the host's milliseconds of a decode step that nobody waits for, and what the profiler counts."""
    import torch

    with torch.no_grad():
        result = model(input_ids=prompt, use_cache=True)
        cache, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_steps):
            result = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = result.logits[:, -1:].argmax(-1)
        enqueued = time.perf_counter() - begin
    return {"host_ms_a_step": 1e3 * enqueued / num_steps, **profile_steps(model, cache, token, num_steps, device)}


def peak_bytes(device: str) -> int:
    """Return the most bytes that tensors have taken on the card in this process; 0 on the CPU."""
    import torch

    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)
