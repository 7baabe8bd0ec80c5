"""One job of one engine on a GGUF file, in a process of its own; the last line printed is its answer in JSON.

    python gguf_job.py JOB

JOB is a job of engines.py with "task": "decode", or "logits" with "windows" (token ids), "file" (receives the logits
of the first window) and "loss_from" (the first window whose losses are told). llama.cpp's process imports neither torch
nor what moeflow depends on, so that its memory is its own.
"""

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

WARM_UP = 2  # tokens at the beginning that are not timed


def main() -> None:
    """Run the job."""
    job = json.loads(sys.argv[1])
    if job["engine"] == "moeflow":
        import torch

        torch.set_num_threads(job["threads"])
    print(json.dumps({"decode": decode, "logits": logits}[job["task"]](job)), flush=True)


def decode(job: dict) -> dict:
    """Generate once to fill what is kept, then once more, timed."""
    from bench import engines

    begin = time.perf_counter()
    engine = {"moeflow": engines.load_moeflow, "llama": engines.load_llama}[job["engine"]](job)
    answer: dict = {"load_s": time.perf_counter() - begin}
    for _ in range(2):
        marks: list[float] = []
        tokens: list[int] = []

        def on_token(token, marks=marks, tokens=tokens):
            marks.append(time.perf_counter())
            tokens.append(token)

        engine.generate(on_token)
    taken = [b - a for a, b in pairwise(marks[WARM_UP:])]
    answer |= {"token_s": statistics.mean(taken), "tokens": tokens, "peak_bytes": peak_bytes()}
    if engine.runtime is not None:
        stats = engine.runtime.stats()
        answer |= {"budget_bytes": stats["memory"]["expert_budget_bytes"], "hit_rate": stats["decode"]["hit_rate"],
                   "step": stats["step"]["mode"], "step_reason": stats["step"]["reason"]}  # fmt: skip
    return answer


def peak_bytes() -> int:
    """Return the most memory that this process ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def logits(job: dict) -> dict:
    """Write the logits of the first window, and tell the mean loss of each window from `loss_from` on, in nats."""
    compute = {"moeflow": of_moeflow, "llama": of_llama}[job["engine"]](job)
    losses = []
    for number, window in enumerate(job["windows"]):
        found = compute(window)  # float32 [tokens, vocabulary]
        if not number:
            np.save(job["file"], found)
        if number < job["loss_from"]:
            continue
        before = found[:-1].astype(np.float64)
        most = before.max(axis=1)
        chosen = before[np.arange(len(before)), window[1:]]
        losses.append(float(np.mean(most + np.log(np.exp(before - most[:, None]).sum(axis=1)) - chosen)))
    return {"losses": losses, "peak_bytes": peak_bytes()}


def of_moeflow(job: dict):
    """Load a model; return what computes the logits of a window."""
    import torch

    from moeflow import load_moe

    model = load_moe(job["model"], device="cpu", dtype=job["dtype"], expert_memory=job["budget"], predictor=None)

    def compute(window: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([window]), use_cache=False).logits[0].float().numpy()

    return compute


def of_llama(job: dict):
    """Load a model; return what computes the logits of a window."""
    import llama_cpp

    most = max(map(len, job["windows"]))
    model = llama_cpp.Llama(
        job["gguf"], n_ctx=most, n_batch=most, n_ubatch=most, n_threads=job["threads"],
        n_threads_batch=job["threads"], logits_all=True, verbose=False,
    )  # fmt: skip

    def compute(window: list[int]) -> np.ndarray:
        model.reset()
        model.eval(window)
        return np.array(model.scores[: len(window)], np.float32)

    return compute


if __name__ == "__main__":
    main()
