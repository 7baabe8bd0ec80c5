"""A card of 12 GB, imitated: a long prompt, and many requests at once, with memory chosen by moeflow itself."""

import time
from typing import Any

from gpu.ballast import Ballast
from gpu.end_to_end import peak_bytes, timed
from gpu.models import draw_prompt, loaded
from gpu.worker import Tell

CARD_BYTES = 12 << 30
PROMPT, REQUESTS, TOKENS = 8192, 32, 48


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run the bfloat16 model, whose experts alone do not fit.

    Raises:
        AssertionError: a request ended in an error.
    """
    length, requests, tokens = (96, 4, 4) if job["dry"] else (PROMPT, REQUESTS, TOKENS)
    with Ballast(job["device"], CARD_BYTES) as ballast, loaded(job, "bfloat16", expert_memory="auto") as model:
        found = timed(model, draw_prompt(model, length), tokens)
        speed = (tokens - 1) / found["decode_s"]
        row = {"what": f"a prompt of {length}", "ttft_s": found["ttft_s"], "tok_per_s": speed}
        tell({**row, "peak_bytes": peak_bytes(job["device"]) - ballast.num_bytes})
        row = serve(model, requests, length // 16, tokens)
        tell({**row, "peak_bytes": peak_bytes(job["device"]) - ballast.num_bytes})
        stats = model.moeflow.stats()
        assert row["finished"]["error"] == 0, f"requests ended in errors: {row['errors']}"
    return {"free_bytes": ballast.free_bytes, "memory": stats["memory"], "plan": stats["plan"]}


def serve(model: Any, requests: int, longest: int, tokens: int) -> dict[str, Any]:
    """Run requests of different lengths through an engine."""
    from moeflow import Engine, SamplingParams

    prompts = [draw_prompt(model, 4 + longest * (n + 1) // requests, n)[0].tolist() for n in range(requests)]
    begin = time.perf_counter()
    with Engine(model, max_batch_size=requests) as engine:
        done = engine.generate(prompts, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        seconds, stats = time.perf_counter() - begin, engine.stats()
    return {
        "what": f"{requests} requests",
        "tok_per_s": sum(len(one.token_ids) for one in done) / seconds,
        "finished": stats["finished"],
        "retries": stats["retries"],
        "steps": stats["steps"],
        "kv_peak_bytes": stats["kv_peak_bytes"],
        "errors": sorted({str(one.error) for one in done if one.error is not None}),
    }
