"""Measure decode speed and TTFT of a mixture-of-experts model: moeflow against transformers, accelerate and llama.cpp.

Every engine runs in a process of its own, on the CPU, with the same prompt, greedy, N tokens with end-of-text ignored.
With --cap, each whole process lives in a fresh memory cgroup; rows called "resident" stay outside it.
"""

import argparse
import importlib.util
import json
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.cgroup import CgroupUnavailable, MemoryCgroup, drop_page_cache, run_process
from bench.engines import ModelSize, plain_bandwidth, work
from bench.machine import print_card
from bench.report import card_lines, find_ratios, print_ratios, print_table, run_card
from bench.rounds import spread
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.demo.model import default_demo_path
from moeflow.errors import MoeflowError
from moeflow.memory_size import parse_memory

ENGINES = ("moeflow", "transformers", "accelerate", "llama")


class Row(NamedTuple):
    """One line of the table.

    Args:
        name: in the table.
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


class Bench:
    """Runs the rows' jobs, one process at a time, and keeps their measurements.

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
        if "transformers" not in args.only:  # one engine has to be the reference
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
        from bench.gguf_file import gguf_of
        from moeflow.errors import MoeflowError

        say("writing the GGUF file for llama.cpp, unless it is there")
        try:
            self.gguf = gguf_of(self.args.model, self.args.work)
        except (MoeflowError, OSError) as error:
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
        ratios, card = find_ratios(rows, disk), run_card(bench)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (MoeflowError, OSError) as error:
        say(str(error))
        return 1
    if not args.json:
        print_card(card_lines(card))
        print_table(rows, args.tokens)
        print_ratios(ratios)
    print(json.dumps({"card": card, "rows": rows, "ratios": ratios, "disk": disk}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
