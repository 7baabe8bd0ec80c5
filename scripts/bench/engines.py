"""The engines bench_decode compares, each as one worker process sees it, and the disk under them."""

import contextlib
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeflow.checkpoint.headers import Checkpoint, open_checkpoint
from moeflow.core import PAGE_BYTES, ExpertKey, align_up

READ_THREADS = 4
# Engines round differently: another first token is right when the reference holds it this close to its best.
MAX_LOGIT_GAP = 0.25


class ModelSize(NamedTuple):
    """What the checkpoint's headers say: bytes of an expert, how many, MoE layers, bytes of everything else."""

    expert_bytes: int
    num_experts: int
    num_layers: int
    num_experts_per_tok: int
    dense_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelSize":
        config = json.loads((checkpoint.folder / "config.json").read_text())
        modules: dict[str, int] = {}
        experts_bytes = dense_bytes = 0
        for name, entry in checkpoint.tensors.items():
            match = re.match(r"(.*\.experts)\.(?:(\d+)\.)?", name)
            if match is None:
                dense_bytes += entry.num_bytes
                continue
            experts_bytes += entry.num_bytes
            count = entry.shape[0] if match[2] is None else int(match[2]) + 1
            modules[match[1]] = max(modules.get(match[1], 0), count)
        if not modules:
            raise SystemExit(
                f"{checkpoint.folder} has no routed experts: this benchmark is for mixture-of-experts models"
            )
        num_experts = sum(modules.values())
        return cls(
            experts_bytes // num_experts, num_experts, len(modules), config.get("num_experts_per_tok", 1), dense_bytes
        )

    @property
    def experts_bytes(self) -> int:
        return self.expert_bytes * self.num_experts

    @property
    def token_bytes(self) -> int:
        return self.expert_bytes * self.num_experts_per_tok * self.num_layers


def step_bytes(model: str, runtime) -> int:
    """Return the bytes of weights that a decode step reads: some experts of each layer, and what is dense.

    Args:
        model: folder of a checkpoint, or a GGUF file.
        runtime: of the loaded model.
    """
    records = sum(source.layout.record.num_bytes for source in runtime.store.layers)
    if not model.endswith(".gguf"):
        size = ModelSize.of(open_checkpoint(Path(model)))
        return records * size.num_experts_per_tok + size.dense_bytes
    from bench.gguf_models import dense_bytes
    from moeflow.hf.model_folder import ModelFolder

    folder = ModelFolder(model)
    return records * folder.config.num_experts_per_tok + dense_bytes(folder.gguf, of_a_step=True)


def plain_bandwidth(
    files: list[Path], read_bytes: int, num_threads: int = READ_THREADS, num_reads: int = 64, seed: int = 0
) -> tuple[float, str]:
    """Read at random places of files, as many at a time as moeflow does, with nothing around the reads.

    Returns:
        Bytes per second, and "O_DIRECT" or "buffered".
    """
    read_bytes = align_up(read_bytes, PAGE_BYTES)
    files = [file for file in files if file.stat().st_size > read_bytes] or [
        max(files, key=lambda file: file.stat().st_size)
    ]
    rng, mode = np.random.default_rng(seed), "O_DIRECT"
    with contextlib.ExitStack() as stack:
        fds = []
        for file in files:
            try:
                fds.append(os.open(file, os.O_RDONLY | os.O_DIRECT))
            except (OSError, AttributeError):
                fds.append(os.open(file, os.O_RDONLY))
                mode = "buffered"
            stack.callback(os.close, fds[-1])
        places = []
        for number in rng.integers(len(files), size=num_reads):
            pages = max((files[number].stat().st_size - read_bytes) // PAGE_BYTES, 1)
            places.append((fds[number], int(rng.integers(pages)) * PAGE_BYTES))

        def read(mine):
            view = memoryview(mmap.mmap(-1, read_bytes))
            return sum(os.preadv(fd, [view], offset) for fd, offset in mine)

        return _timed_in_threads(read, places, num_threads), mode


def store_bandwidth(runtime, num_threads: int, num_reads: int = 64, seed: int = 0) -> float:
    """Read random experts through moeflow's ExpertStore, from as many threads as it uses itself."""
    store, rng = runtime.store, np.random.default_rng(seed)
    keys = [ExpertKey(layer, e) for layer, s in enumerate(store.layers) for e in range(s.layout.num_experts)]
    chosen = [keys[number] for number in rng.permutation(len(keys))[:num_reads]]
    room = align_up(max(source.layout.record.num_bytes for source in store.layers), PAGE_BYTES)

    def read(mine):
        record = np.frombuffer(mmap.mmap(-1, room), np.uint8)
        return sum(store.read(key, record) for key in mine)

    return _timed_in_threads(read, chosen, num_threads)


def _timed_in_threads(read: Callable, work: list, num_threads: int) -> float:
    with ThreadPoolExecutor(num_threads) as threads:
        begin = time.perf_counter()
        num_bytes = sum(threads.map(read, [work[i::num_threads] for i in range(num_threads)]))
        return num_bytes / (time.perf_counter() - begin)


class Engine(NamedTuple):
    """A loaded model.

    Args:
        generate: feeds the prompt and calls its argument with each new token as it comes.
        reference: the best (token, logit) pairs after the prompt, from the engine that is the reference.
        runtime: moeflow's runtime.
    """

    generate: Callable[[Callable[[int], None]], None]
    reference: Callable[[], list] | None = None
    runtime: object = None


def work(job: dict) -> dict:
    """Run one job of one engine and return its measurements."""
    begin = time.perf_counter()
    engine = {
        "moeflow": load_moeflow,
        "transformers": load_transformers,
        "accelerate": load_accelerate,
        "llama": load_llama,
    }[job["engine"]](job)
    result = {"load_s": time.perf_counter() - begin, "repeats": []}
    if job["task"] == "disk":
        return _compare_disk(engine.runtime, job)
    cold = result["cold"] = _generate(engine, job)
    _check_first_token(cold["tokens"][0], job["reference"])
    begin = time.perf_counter()
    while len(result["repeats"]) < job["repeats"]:
        result["repeats"].append(_generate(engine, job))
        if time.perf_counter() - begin > job["seconds"]:
            break
    from moeflow.hardware import process_memory_bytes

    result["peak_bytes"] = process_memory_bytes()[1]
    if engine.runtime is not None:
        stats = engine.runtime.stats()
        result["moeflow"] = {"slots": stats["slots"], **stats["memory"]}
    if engine.reference is not None and job["reference"] is None:
        result["reference"] = engine.reference()
    return result


def _generate(engine: Engine, job: dict) -> dict:
    tokens, marks, reads = [], [], []

    def on_token(token):
        marks.append(time.perf_counter())
        tokens.append(token)
        if len(tokens) in (1, job["tokens"]):
            reads.append(_bytes_read())

    if engine.runtime is not None:
        engine.runtime.reset_stats()
    begin = time.perf_counter()
    engine.generate(on_token)
    assert len(tokens) == job["tokens"], f"{len(tokens)} tokens came, {job['tokens']} were asked for"
    steps = len(tokens) - 1
    measured = {
        "tokens": tokens,
        "ttft_s": marks[0] - begin,
        "tokens_per_s": steps / (marks[-1] - marks[0]),
        "read_bytes_per_token": (reads[1] - reads[0]) / steps,
    }
    if engine.runtime is not None:
        measured["decode"] = engine.runtime.stats()["decode"]
    return measured


def _check_first_token(token: int, reference: list | None) -> None:
    if reference is None:
        return
    logits = dict(map(tuple, reference))
    if token not in logits or reference[0][1] - logits[token] > MAX_LOGIT_GAP:
        raise RuntimeError(f"wrong output: first token {token}, transformers says {reference[0][0]}")


def _compare_disk(runtime, job: dict) -> dict:
    """Read through the store and plainly, turn by turn."""
    num_threads, files = runtime.stats()["io"]["threads"], runtime.store.files
    read_bytes = max(source.layout.record.num_bytes for source in runtime.store.layers)
    plain, store, mode = [], [], ""
    for turn in range(job["repeats"] + 1):
        rate, mode = plain_bandwidth(files, read_bytes, num_threads, seed=turn)
        plain.append(rate)
        store.append(store_bandwidth(runtime, num_threads, seed=turn))
    return {
        "plain": plain[1:],
        "store": store[1:],
        "mode": mode,
        "store_mode": runtime.store.mode,
        "threads": num_threads,
    }


def load_moeflow(job: dict) -> Engine:
    import moeflow

    options = {"expert_memory": job["budget"], "step": "auto", **job.get("options", {})}
    model = moeflow.load_moe(job["model"], device="cpu", **options)
    return Engine(_hf_generate(model, job), runtime=model.moeflow)


def load_transformers(job: dict) -> Engine:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", experts_implementation="eager").eval()

    def reference():
        import torch

        with torch.inference_mode():
            best = model(torch.tensor([job["prompt"]])).logits[0, -1].float().topk(10)
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    return Engine(_hf_generate(model, job), reference)


def load_accelerate(job: dict) -> Engine:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": job["max_memory_bytes"]},
        offload_folder=job["scratch"],
    ).eval()
    if "disk" not in model.hf_device_map.values():
        raise RuntimeError("accelerate put nothing on the disk")
    return Engine(_hf_generate(model, job))


def _hf_generate(model, job: dict) -> Callable:
    import torch

    # Without an end token, transformers would take a padding token inside the prompt for padding: hence the mask.
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([job["prompt"]])

    def generate(on_token):
        class Streamer:
            seen_prompt = False

            def put(self, value):
                if self.seen_prompt:
                    on_token(int(value.reshape(-1)[0]))
                self.seen_prompt = True

            def end(self):
                pass

        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job["tokens"],
            do_sample=False,
            streamer=Streamer(),
        )

    return generate


def load_llama(job: dict) -> Engine:
    import llama_cpp

    if job.get("mapped"):  # repacked weights are a copy in memory, which no limit can page out
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def without_repacking():
            options = defaults()
            options.use_extra_bufts = False
            return options

        llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    cores = job.get("threads") or len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        job["gguf"],
        n_ctx=max(512, len(job["prompt"]) + job["tokens"]),
        n_threads=cores,
        n_threads_batch=cores,
        use_mmap=True,
        verbose=False,
    )
    if model.tokenize(job["text"].encode(), add_bos=False, special=True) != job["prompt"]:
        print("llama.cpp splits the prompt into other tokens; it gets transformers' tokens", file=sys.stderr)

    def best():
        logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def generate(on_token):
        model.reset()
        model.eval(job["prompt"])
        on_token(token := best())
        for _ in range(job["tokens"] - 1):
            model.eval([token])
            on_token(token := best())

    return Engine(generate)


def _bytes_read() -> int:
    """Bytes this process took from disks, page faults included."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes"):
                return int(line.split()[1])
    return 0
