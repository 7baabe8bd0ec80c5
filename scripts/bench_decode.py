"""Measure decode speed and TTFT of a mixture-of-experts model: moeflow against transformers, accelerate and llama.cpp.

Every engine runs in a process of its own, on the CPU, with the same prompt, greedy, N tokens with end-of-text ignored.
With --cap, each whole process lives in a fresh memory cgroup; rows called "resident" stay outside it.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from moeflow.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from moeflow.config import parse_memory  # noqa: E402
from moeflow.core import PAGE_BYTES, ExpertKey, align_up  # noqa: E402
from moeflow.demo_model import default_demo_path  # noqa: E402
from moeflow.errors import MoeflowError  # noqa: E402
from moeflow.hardware import process_memory_bytes  # noqa: E402
from scripts.cgroup import CgroupUnavailable, MemoryCgroup, drop_page_cache, run_process  # noqa: E402

ENGINES = ("moeflow", "transformers", "accelerate", "llama")
OVERHEAD_LIMIT_BYTES = 550_000_000  # what a process may take beside its budget and the dense weights
READ_THREADS = 4
# Engines round differently: another first token is right when the reference holds it this close to its best.
MAX_LOGIT_GAP = 0.25


class Row(NamedTuple):
    """One line of the table.

    Args:
        name: what is printed.
        engine: one of ENGINES.
        budget: expert_memory, or None where the engine has no such thing.
        capped: whether it runs under --cap.
        rounds: fresh processes to run; rows of a compared pair take turns.
    """

    name: str
    engine: str
    budget: str | None
    capped: bool
    rounds: int


def plan_rows(only: tuple[str, ...], residencies: tuple[str, ...], capped: bool, rounds: int) -> list[list[Row]]:
    """List the rows in groups that take turns: a compared pair is one group, everything else its own."""
    resident = [
        Row("moeflow 100 %", "moeflow", "100%", False, rounds),
        Row("transformers eager", "transformers", None, False, rounds),
    ]
    tight = [
        Row("moeflow auto", "moeflow", "auto", True, rounds),
        Row("llama.cpp mmap f16", "llama", None, True, rounds),
    ]
    groups = [resident[::-1], tight] if capped else [resident[::-1], tight[:1]]
    groups.append([Row("llama.cpp mmap f16, resident", "llama", None, False, 1)])
    for engine in ("moeflow", "accelerate"):
        names = {"moeflow": "moeflow", "accelerate": "accelerate disk offload"}
        groups += [[Row(f"{names[engine]} {b.replace('%', ' %')}", engine, b, True, 1)] for b in residencies]
    return [kept for group in groups if (kept := [row for row in group if row.engine in only])]


# --- what is measured -------------------------------------------------------------------------------------------------


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


# --- the worker: one engine in a process of its own -------------------------------------------------------------------


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
    """Run one job of one engine and return what was measured."""
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

    model = moeflow.load_moe(job["model"], expert_memory=job["budget"], device="cpu")
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

    cores = len(os.sched_getaffinity(0))
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


# --- the benchmark: jobs in turn, then figures ------------------------------------------------------------------------


class Bench:
    """Runs the rows' jobs, one process at a time, and keeps what they measured.

    Args:
        args: the command line.
        scratch: a folder for this run only.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args = args
        self.scratch = scratch
        self.checkpoint = open_checkpoint(args.model)
        self.size = ModelSize.of(self.checkpoint)
        self.text, self.prompt = _prompt(args.model, args.prompt)
        self.disk: list[float] = []
        self.disk_mode = ""
        self.gguf: Path | None = None
        self.reference: dict | None = None
        self.cap_bytes = parse_memory(args.cap, name="--cap", whole_bytes=0) if args.cap else None
        self.cap_refused: str | None = None
        if self.cap_bytes is not None:
            try:
                MemoryCgroup.create(self.cap_bytes).remove()
            except CgroupUnavailable as error:
                self.cap_bytes, self.cap_refused = None, str(error)
                say(f"no memory cgroup can be made here ({error}): going on without a cap")

    def run(self) -> list[dict]:
        """Run everything; return a row of figures a row of the table."""
        args = self.args
        groups = plan_rows(args.only, args.residencies, self.cap_bytes is not None, args.rounds)
        self._measure_disk()
        unusable = {}
        if "llama" in args.only and (why := self._prepare_llama()):
            unusable["llama"] = why
        if "transformers" not in args.only:  # somebody has to say what is right
            found = self._run_job(Row("reference", "transformers", None, False, 1), num_repeats=0)
            say(f"reference not available, outputs are not compared: {found['error']}") if "error" in found else None
        rows = []
        for group in groups:
            results: dict[str, list[dict]] = {row.name: [] for row in group}
            for turn in range(max(row.rounds for row in group)):
                for row in group:
                    if turn >= row.rounds or any("error" in result for result in results[row.name]):
                        continue
                    say(f"{row.name}{f', round {turn + 1} of {row.rounds}' if row.rounds > 1 else ''}")
                    if row.engine in unusable:
                        results[row.name].append({"error": unusable[row.engine]})
                    else:
                        results[row.name].append(self._run_job(row, -(-args.repeats // row.rounds)))
                    self._measure_disk()
            rows += [self._summary(row, results[row.name]) for row in group]
        return rows

    def compare_disk(self) -> dict:
        """Measure moeflow's store against plain reads of the same size and depth."""
        say("moeflow's store against plain reads")
        row = Row("store", "moeflow", "12.5%", False, 1)
        return self._run_job(row, max(self.args.repeats, 5), task="disk")

    def _run_job(self, row: Row, num_repeats: int, task: str = "decode") -> dict:
        args, limit = self.args, self.cap_bytes if row.capped else None
        scratch = self.scratch / "offload"
        scratch.mkdir(exist_ok=True)
        share = float(row.budget[:-1]) / 100 if row.budget and row.budget.endswith("%") else 1
        job = {
            "task": task,
            "engine": row.engine,
            "model": str(args.model),
            "budget": row.budget,
            "max_memory_bytes": int(share * self.size.experts_bytes) + self.size.dense_bytes,
            "gguf": str(self.gguf),
            "text": self.text,
            "prompt": self.prompt,
            "tokens": args.tokens,
            "repeats": num_repeats,
            "seconds": args.seconds,
            "scratch": str(scratch),
            "reference": self.reference and self.reference["best"],
        }
        left = drop_page_cache(self.checkpoint.files + ([self.gguf] if self.gguf else []))
        if left > 50_000_000:
            say(f"{left / 1e6:.0f} MB of the model stay in the page cache (another process maps them)")
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
        ended = run_process(command, limit_bytes=limit, timeout_s=3 * args.seconds + 300)
        shutil.rmtree(scratch, ignore_errors=True)
        answer = next((line for line in reversed(ended.stdout.splitlines()) if line.startswith("{")), None)
        if ended.returncode or answer is None:
            return {"error": _why(ended)}
        result = json.loads(answer) | {"cgroup_peak_bytes": ended.peak_bytes, "cached_bytes_before": left}
        if self.reference is None and "reference" in result:
            self.reference = {"best": result["reference"], "tokens": result["cold"]["tokens"]}
        return result

    def _prepare_llama(self) -> str | None:
        """Make the GGUF file; return why llama.cpp cannot run, if so."""
        if importlib.util.find_spec("llama_cpp") is None:
            return "not installed"
        from scripts.gguf_export import ExportError, export_gguf

        say("writing the GGUF file for llama.cpp, unless it is there")
        try:
            self.gguf = export_gguf(self.args.model, self.args.work)
        except (ExportError, OSError) as error:
            return f"no GGUF: {error}"
        return None

    def _measure_disk(self) -> None:
        rate, self.disk_mode = plain_bandwidth(self.checkpoint.files, self.size.expert_bytes, seed=len(self.disk))
        self.disk.append(rate)

    def _summary(self, row: Row, results: list[dict]) -> dict:
        """Turn a row's rounds into figures."""
        figures = {"name": row.name, "engine": row.engine, "capped": row.capped and self.cap_bytes is not None}
        good = [result for result in results if "error" not in result]
        errors = [result["error"] for result in results if "error" in result]
        if errors:
            figures["error"] = errors[0]
            say(f"  {errors[0]}")
        if not good:
            return figures
        repeats = [repeat for result in good for repeat in result["repeats"]]
        figures["rounds"] = [[repeat["tokens_per_s"] for repeat in result["repeats"]] for result in good]
        figures["tokens_per_s"] = spread([repeat["tokens_per_s"] for repeat in repeats])
        figures["ttft_cold_s"] = spread([result["cold"]["ttft_s"] for result in good])
        figures["ttft_warm_s"] = spread([repeat["ttft_s"] for repeat in repeats])
        figures["load_s"] = spread([result["load_s"] for result in good])
        read = figures["read_bytes_per_token"] = statistics.median(repeat["read_bytes_per_token"] for repeat in repeats)
        figures["disk_bound_tokens_per_s"] = statistics.median(self.disk) / read if read >= 1 else None
        figures["peak_bytes"] = max(result["peak_bytes"] for result in good)
        figures["cgroup_peak_bytes"] = max((result["cgroup_peak_bytes"] or 0 for result in good), default=0) or None
        if self.reference is not None:
            figures["tokens_as_reference"] = _common_prefix(repeats[-1]["tokens"], self.reference["tokens"])
        if "moeflow" in good[-1]:
            figures["moeflow"] = good[-1]["moeflow"]
            decode = [repeat["decode"] for repeat in repeats]
            demands = sum(d["hits"] + d["misses"] for d in decode)
            figures["hit_rate"] = sum(d["hits"] for d in decode) / demands if demands else None
            figures["stall_s"] = statistics.median(d["stall_s"] for d in decode)
            figures["over_budget_bytes"] = (
                figures["peak_bytes"] - figures["moeflow"]["expert_budget_bytes"] - self.size.dense_bytes
            )
        say(f"  {figures['tokens_per_s']['median']:.2f} tok/s, peak {figures['peak_bytes'] / 1e6:.0f} MB")
        return figures


def spread(values: list[float]) -> dict:
    """Return median, least, greatest and number of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def find_ratios(rows: list[dict], disk: dict | None) -> dict:
    """Return the named ratios; one that could not be measured says why."""
    by_name = {row["name"]: row for row in rows}
    ratios = {
        "capped: moeflow / llama.cpp": _ratio(by_name, "moeflow auto", "llama.cpp mmap f16", capped=True),
        "resident: moeflow / transformers eager": _ratio(by_name, "moeflow 100 %", "transformers eager", capped=False),
    }
    over = {row["name"]: row["over_budget_bytes"] / 1e6 for row in rows if "over_budget_bytes" in row}
    ratios["peak memory - (budget + dense)"] = (
        {"worst_mb": max(over.values()), "limit_mb": OVERHEAD_LIMIT_BYTES / 1e6, "rows": over}
        if over
        else {"missing": "no moeflow row"}
    )
    if disk is None or "error" in disk:
        read = {"missing": disk["error"] if disk else "moeflow was not measured"}
    else:
        turns = [a / b for a, b in zip(disk["store"], disk["plain"], strict=True)]
        medians = [statistics.median(disk[name]) for name in ("store", "plain")]
        read = {
            "ratio": medians[0] / medians[1],
            "rounds": turns,
            "store_bytes_per_s": medians[0],
            "plain_bytes_per_s": medians[1],
        }
    ratios["read bandwidth / plain O_DIRECT"] = read
    return ratios


def _ratio(by_name: dict, ours: str, theirs: str, capped: bool) -> dict:
    pair = [by_name.get(name) for name in (ours, theirs)]
    for name, row in zip((ours, theirs), pair, strict=True):
        if row is None or "rounds" not in row:
            return {"missing": f"{name}: {row['error'] if row else 'not measured'}"}
        if capped and not row["capped"]:
            return {"missing": "needs --cap, and a machine with memory cgroups"}
    rounds = [
        statistics.median(a) / statistics.median(b) for a, b in zip(*(row["rounds"] for row in pair), strict=False)
    ]
    return {"ratio": pair[0]["tokens_per_s"]["median"] / pair[1]["tokens_per_s"]["median"], "rounds": rounds}


def _common_prefix(tokens: list[int], reference: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b), len(tokens))


def _why(ended) -> str:
    """Say in short why a worker failed."""
    if ended.oom_killed:
        return "out of memory: killed at the cap"
    if ended.timed_out:
        return "took too long"
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"ended with status {ended.returncode}")[:160]


def _prompt(model: Path, question: str) -> tuple[str, list[int]]:
    """Return the prompt as text, in the model's chat template if it has one, and as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    text = question
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text, tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


# --- what is printed --------------------------------------------------------------------------------------------------


def describe(bench: Bench) -> dict:
    """Return the card: model, machine, versions, and how it is measured."""
    import psutil

    size, args = bench.size, bench.args
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU"
    )
    versions = {}
    for name in ("moeflow", "torch", "transformers", "accelerate", "llama_cpp_python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "model": str(args.model),
        "num_experts": size.num_experts,
        "num_layers": size.num_layers,
        "num_experts_per_tok": size.num_experts_per_tok,
        "expert_bytes": size.expert_bytes,
        "token_bytes": size.token_bytes,
        "experts_bytes": size.experts_bytes,
        "dense_bytes": size.dense_bytes,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "disk_bytes_per_s": spread(bench.disk),
        "disk_mode": bench.disk_mode,
        "python": sys.version.split()[0],
        "versions": versions,
        "cap_bytes": bench.cap_bytes,
        "cap_refused": bench.cap_refused,
        "tokens": args.tokens,
        "prompt_tokens": len(bench.prompt),
    }


def print_card(card: dict) -> None:
    """Print the card."""
    disk, versions = (
        card["disk_bytes_per_s"],
        ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    )
    cap = (
        f"{card['cap_bytes'] / 1e6:.0f} MB"
        if card["cap_bytes"]
        else f"none{f' ({r})' if (r := card['cap_refused']) else ''}"
    )
    counts = f"{card['num_experts']} experts in {card['num_layers']} layers, top-{card['num_experts_per_tok']}"
    expert, experts, dense = (card[f"{name}_bytes"] / 1e6 for name in ("expert", "experts", "dense"))
    print(f"model     {card['model']}: {counts}")
    print(f"expert    {expert:.2f} MB; all {experts:.0f} MB; dense {dense:.0f} MB")
    print(f"token     {card['token_bytes'] / 1e6:.1f} MB at 100 % miss")
    print(f"machine   {card['cpu']}, {card['cores']} cores, {card['memory_bytes'] / 1e9:.0f} GB")
    sampled = f"{disk['min'] / 1e9:.2f} to {disk['max'] / 1e9:.2f} in {disk['n']} samples"
    depth = f"{card['disk_mode']} reads of an expert, {READ_THREADS} at a time"
    print(f"disk      {disk['median'] / 1e9:.2f} GB/s ({sampled}), {depth}")
    print(f"ceiling   {disk['median'] / card['token_bytes']:.2f} tok/s if every expert came from the disk")
    print(f"software  Python {card['python']}, {versions}")
    print(f"run       {card['prompt_tokens']} tokens of prompt, {card['tokens']} of greedy decode, cap {cap}\n")


def print_table(rows: list[dict], tokens: int) -> None:
    """Print the rows as a markdown table."""
    heads = [
        "engine",
        "tok/s (range, n)",
        "TTFT cold / warm s",
        "hit rate",
        "read MB/tok",
        "disk bound tok/s",
        "stall s",
    ]
    heads += ["peak RSS MB", "cgroup MB", "over budget MB", f"tokens as eager of {tokens}"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        name = row["name"] + (", capped" if row["capped"] else "")
        if "rounds" not in row:
            print(f"| {name} | {row['error']} |" + " - |" * (len(heads) - 2))
            continue
        speed = row["tokens_per_s"]
        cells = (
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f}, {speed['n']})"
            + (f", then: {row['error']}" if "error" in row else ""),
            f"{row['ttft_cold_s']['median']:.2f} / {row['ttft_warm_s']['median']:.2f}",
            _cell(row.get("hit_rate"), 1, 3),
            _cell(row["read_bytes_per_token"], 1e6, 1),
            _cell(row["disk_bound_tokens_per_s"], 1, 1),
            _cell(row.get("stall_s"), 1, 2),
            _cell(row["peak_bytes"], 1e6, 0),
            _cell(row["cgroup_peak_bytes"], 1e6, 0),
            _cell(row.get("over_budget_bytes"), 1e6, 0),
            _cell(row.get("tokens_as_reference"), 1, 0),
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_ratios(ratios: dict) -> None:
    """Print the named ratios."""
    for name, ratio in ratios.items():
        if "missing" in ratio:
            print(f"{name}: - ({ratio['missing']})")
        elif "worst_mb" in ratio:
            print(f"{name}: {ratio['worst_mb']:.0f} MB at worst, limit {ratio['limit_mb']:.0f} MB")
        else:
            print(f"{name}: {ratio['ratio']:.2f} (rounds {min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f})")
    print()


def _cell(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=default_demo_path(), help="checkpoint folder (moeflow's demo model)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the GGUF file and scratch files (bench/ beside the demo model)"
    )
    parser.add_argument("--only", default=",".join(ENGINES), help=f"engines, comma separated ({','.join(ENGINES)})")
    parser.add_argument("--residencies", default="50,25,12.5", help="percent of the experts in memory (50,25,12.5)")
    parser.add_argument("--cap", metavar="SIZE", help='memory limit of every whole process, such as "1000MB"')
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (64)")
    parser.add_argument("--repeats", type=int, default=5, help="measured generations a row, after one to warm up (5)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="fresh processes of each of a compared pair, in turns (3)"
    )
    parser.add_argument(
        "--seconds", type=float, default=180, help="no further repeat of a process after this long (180)"
    )
    parser.add_argument("--prompt", default="Explain how a bicycle works.")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.residencies = tuple(f"{percent.strip()}%" for percent in args.residencies.split(","))
    args.only = tuple(name.strip() for name in args.only.split(","))
    if unknown := set(args.only) - set(ENGINES):
        parser.error(f"--only {', '.join(sorted(unknown))}: known engines are {', '.join(ENGINES)}")
    if args.tokens < 2 or args.repeats < 1 or args.rounds < 1:
        parser.error("--tokens must be at least 2, --repeats and --rounds at least 1")
    args.work = args.work or default_demo_path().parent / "bench"
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one worker of it."""
    args = parse_args(argv)
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the worker and remove its cgroup
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="run-", dir=args.work) as scratch:
            bench = Bench(args, Path(scratch))
            rows = bench.run()
            disk = bench.compare_disk() if "moeflow" in args.only else None
        ratios, card = find_ratios(rows, disk), describe(bench)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (MoeflowError, OSError) as error:
        say(str(error))
        return 1
    if not args.json:
        print_card(card)
        print_table(rows, args.tokens)
        print_ratios(ratios)
    print(json.dumps({"card": card, "rows": rows, "ratios": ratios, "disk": disk}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
