"""Measure GGUF files: exactness, logits and perplexity, decoding against llama.cpp on the same file, and memory.

    python scripts/bench_gguf.py --llama-python PYTHON [--only decode,capped] [--kinds q4_k_m,q8_0]

The model's file is written in F16 by `moeflow gguf`, and in the other types by llama.cpp. The model "wide" has random
blocks and rows of 2048, which Q4_K_M needs (of rows that are no multiple of 256 it makes Q5_0 and Q8_0); "large" is
the same with more experts and layers, for runs whose memory is half of the file. Engines run in processes of their own
and take turns; ratios are taken turn by turn. The last line printed is one JSON object.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from bench.cgroup import CgroupUnavailable, drop_page_cache, run_process
from bench.gguf_models import LARGE, WIDE, dense_bytes, float_folder, quantized, random_gguf
from bench.machine import describe, print_card, software
from bench.rounds import quotients, ranged, spread
from bench.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "scripts" / "bench" / "gguf_job.py"
PARTS = ("exact", "logits", "decode", "capped", "memory")
KINDS = ("f16", "q8_0", "q4_k_m")
PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
TIMEOUT_S = 1800
LOGITS_TOKENS = 64
GOALS = {"relative_norm": 2e-2, "perplexity": 0.005, "decode": 1.0, "capped": 5.0, "memory_bytes": 550_000_000}


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for."""
    arguments = parse(argv)
    from moeflow.errors import MoeflowError

    card = describe("torch", "transformers", "gguf")
    if not arguments.json:
        print_card({"machine": f"{card['cpu']}, {card['cores']} cores, load {card['load']:.1f}",
                    "software": software(card), "model": str(arguments.model)})  # fmt: skip
    bench, results = Bench(arguments), {}
    try:
        for part in arguments.only:
            results[part] = getattr(bench, part)()
    except (MoeflowError, OSError) as error:
        say(str(error))
        return 1
    print(json.dumps({"machine": card, "goals": GOALS, "results": results}))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from moeflow.demo.model import default_demo_path

    data = Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; without it the demo model")
    parser.add_argument("--work", type=Path, help="folder of files made from it (bench/ beside the demo model)")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and numpy (this one)")
    parser.add_argument("--only", type=_names, default=PARTS, help=f"parts, by commas ({','.join(PARTS)})")
    parser.add_argument("--kinds", type=_names, default=KINDS, help=f"types of decode, by commas ({','.join(KINDS)})")
    parser.add_argument("--cases", type=_names, default=("model", "wide"), help="models of decode (model,wide)")
    parser.add_argument("--capped", type=_names, default=("large",), help="models of capped: large, model (large)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine (all cores)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a turn (32)")
    parser.add_argument("--exact-tokens", type=int, default=64, help="compared by exact (64)")
    parser.add_argument("--perplexity-tokens", type=int, default=4096, help="of WikiText-2 validation (4096)")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other (512)")
    parser.add_argument("--dtypes", type=_names, default=("float32", "bfloat16"), help="of logits (float32,bfloat16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (3)")
    parser.add_argument("--data", type=Path, default=data, help="folder with wikitext2/valid.txt")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args(argv)
    for given, known in (("only", PARTS), ("kinds", KINDS), ("cases", ("model", "wide")),
                         ("capped", ("large", "model")), ("dtypes", ("float32", "bfloat16"))):  # fmt: skip
        if unknown := set(getattr(arguments, given)) - set(known):
            parser.error(f"--{given} {', '.join(sorted(unknown))}: known are {', '.join(known)}")
    if min(arguments.rounds, arguments.tokens - 4, arguments.window - 1) < 1:
        parser.error("--rounds must be at least 1, --tokens 5 and --window 2")
    arguments.model = arguments.model or default_demo_path()
    arguments.work = arguments.work or default_demo_path().parent / "bench"
    arguments.llama_python = arguments.llama_python or sys.executable
    return arguments


class Bench:
    """The parts of the benchmark; each prints its lines and returns its figures.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def file(self, kind: str, case: str = "model") -> Path:
        """Return a GGUF file, made when it is first asked for."""
        from bench.gguf_file import gguf_of

        arguments = self.arguments
        if case != "model":
            say(f"{case}, {kind}: making the file, unless it is there")
            sizes = {"wide": WIDE, "large": LARGE}[case]
            return random_gguf(arguments.work, case, sizes, kind, arguments.model)
        say(f"{kind}: making the file, unless it is there")
        made = gguf_of(arguments.model, arguments.work)
        return made if kind == "f16" else quantized(made, kind, arguments.llama_python, arguments.threads)

    def exact(self) -> dict:
        """Compare greedy tokens in float32 with those of the same values in safetensors, by us and by transformers."""
        rows = {}
        for kind in ("f16", "q8_0"):
            file = self.file(kind)
            say(f"{kind}: writing its values, unless they are there")
            folder, tokens = float_folder(file, self.arguments.work), {}
            for name, engine, model in (("file", "moeflow", file), ("values", "moeflow", folder),
                                        ("values in transformers", "transformers", folder)):  # fmt: skip
                say(f"{kind}: {name}")
                worker = Worker(sys.executable, self._job(name, engine, model, dtype="float32"))
                tokens[name] = worker.decode(self.arguments.exact_tokens)["tokens"]
                worker.end()
            same = {name: _prefix(tokens["file"], found) for name, found in tokens.items() if name != "file"}
            rows[kind] = {"tokens": self.arguments.exact_tokens, "same": same}
            self._print(f"exact, {kind}: of {self.arguments.exact_tokens} greedy tokens, the first "
                        + ", ".join(f"{count} equal those of the {name}" for name, count in same.items()))  # fmt: skip
        return rows

    def logits(self) -> dict:
        """Compare logits and perplexity with llama.cpp's on the Q4_K_M file."""
        import numpy as np
        from transformers import AutoTokenizer

        arguments, file = self.arguments, self.file("q4_k_m")
        text = (arguments.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(arguments.model)(text, add_special_tokens=False, verbose=False)["input_ids"]
        count, available = max(arguments.perplexity_tokens // arguments.window, 1), len(ids) // arguments.window
        places = [number * available // count * arguments.window for number in range(count)]
        windows = [ids[:LOGITS_TOKENS], *(ids[place : place + arguments.window] for place in places)]
        common = {"task": "logits", "windows": windows, "loss_from": 1, "gguf": str(file), "model": str(file),
                  "threads": arguments.threads, "budget": "100%"}  # fmt: skip
        sides = {"llama.cpp": (arguments.llama_python, {"engine": "llama"})}
        sides |= {dtype: (sys.executable, {"engine": "moeflow", "dtype": dtype}) for dtype in arguments.dtypes}
        exact = {"gguf": str(self.file("f16")), "model": str(self.file("f16")), "windows": windows[:1]}
        sides["llama.cpp f16"] = (arguments.llama_python, {"engine": "llama", **exact})
        sides["f16"] = (sys.executable, {"engine": "moeflow", "dtype": "float32", **exact})
        found, losses = {}, {}
        for name, (python, job) in sides.items():
            say(f"logits: {name}")
            target = arguments.work / f"logits-{os.getpid()}.npy"
            try:
                losses[name] = self._run(python, {**common, **job, "file": str(target)})["losses"]
                found[name] = np.load(target).astype(np.float64)
            finally:
                target.unlink(missing_ok=True)
        control = float(np.linalg.norm(found["f16"] - found["llama.cpp f16"]) / np.linalg.norm(found["llama.cpp f16"]))
        self._print(f"logits of the F16 file, where llama.cpp rounds no activations to 8 bits: {control:.2e}")
        theirs = found["llama.cpp"]
        rows = {"llama.cpp": {"perplexity": float(np.exp(np.mean(losses["llama.cpp"])))}}
        for dtype in arguments.dtypes:
            norm = float(np.linalg.norm(found[dtype] - theirs) / np.linalg.norm(theirs))
            value = float(np.exp(np.mean(losses[dtype])))
            change = value / rows["llama.cpp"]["perplexity"] - 1
            best = float(np.mean(found[dtype].argmax(1) == theirs.argmax(1)))
            rows[dtype] = {"relative_norm": norm, "same_best": best, "perplexity": value, "perplexity_change": change}
            self._print(
                f"logits, {dtype}: differ from llama.cpp's by {norm:.2e} of their norm over {len(theirs)} tokens (goal "
                f"{GOALS['relative_norm']:.0e}), the best token is the same at {best:.1%}; perplexity {value:.3f} and "
                f"{rows['llama.cpp']['perplexity']:.3f}, {change:+.2%} (goal {GOALS['perplexity']:.1%})"
            )
        return {"windows": len(windows) - 1, "window": arguments.window, "sides": rows, "f16_relative_norm": control}

    def decode(self) -> dict:
        """Let a native step and llama.cpp take turns, everything in memory."""
        rows: dict[str, dict] = {}
        for case in self.arguments.cases:
            for kind in self.arguments.kinds:
                if case == "model" or kind != "f16":
                    rows[f"{case} {kind}"] = self._decode_row(f"{case} {kind}", self.file(kind, case))
        return rows

    def _decode_row(self, name: str, file: Path) -> dict:
        arguments = self.arguments
        workers = [
            Worker(sys.executable, self._job("moeflow", "moeflow", file)),
            Worker(arguments.llama_python, self._job("llama.cpp", "llama", file)),
        ]
        answers: dict[str, list[dict]] = {worker.name: [] for worker in workers}
        for turn in range(arguments.rounds + 1):
            say(f"decode, {name}: turn {turn} of {arguments.rounds}")
            for worker in workers:
                answer = worker.decode(arguments.tokens)
                if turn:
                    answers[worker.name].append(answer)
        for worker in workers:
            worker.end()
        times = {engine: [answer["token_s"] for answer in found] for engine, found in answers.items()}
        rates = [answer["read_bytes_per_s"] for answer in answers["moeflow"]]
        kernels = [sum(answer["step"]["kinds_s"].values()) for answer in answers["moeflow"]]
        floor = [workers[0].ready["bytes"] / rate for rate in rates]
        row = {
            "step_bytes": workers[0].ready["bytes"], "instruction_set": workers[0].ready["instruction_set"],
            "token_s": {engine: spread(found) for engine, found in times.items()},
            "ratio": quotients(times["llama.cpp"], times["moeflow"]),
            "kernels_ratio": quotients(times["llama.cpp"], kernels),
            "share_of_bandwidth": {engine: quotients(floor, found) for engine, found in times.items()},
            "read_bytes_per_s": spread(rates), "kinds_s": answers["moeflow"][-1]["step"]["kinds_s"],
            "same_tokens": _prefix(*(found[0]["tokens"] for found in answers.values())), "rounds": times,
        }  # fmt: skip
        self._print(f"decode, {name}: llama.cpp's time / ours {ranged(row['ratio'], 1, 4, 2)} (goal {GOALS['decode']})")
        self._print(f"  llama.cpp's whole token / our kernels {ranged(row['kernels_ratio'], 1, 4, 2)}, the rest of a "
                    f"token is generate's and the step's Python")  # fmt: skip
        for engine in times:
            share = ranged(row["share_of_bandwidth"][engine], 100, 5, 1)
            taken = ranged(row["token_s"][engine], 1e3, 8, 2)
            self._print(f"  {engine:10} {taken} ms a token, {share} % of the memory's bandwidth")
        return row

    def capped(self) -> dict:
        """Decode in a memory cgroup of half of the file's size, llama.cpp from its memory mapping alone."""
        rows = {}
        for case in self.arguments.capped:
            file = self.file("q4_k_m" if case == "large" else "f16", case)
            limit = file.stat().st_size // 2
            name = f"{case} in {limit / 1e6:.0f} MB"
            sides = {"llama.cpp": ("llama", self.arguments.llama_python), "moeflow": ("moeflow", sys.executable)}
            runs: dict[str, list[dict]] = {side: [] for side in sides}
            for turn in range(self.arguments.rounds):
                for side, (engine, python) in sides.items():
                    say(f"capped, {name}: {side}, turn {turn + 1} of {self.arguments.rounds}")
                    drop_page_cache([file])
                    job = {**self._job(side, engine, file), "task": "decode", "budget": "auto", "options": {}}
                    job["mapped"] = True  # llama.cpp computes from the file's pages, without a repacked copy
                    try:
                        runs[side].append(self._run(python, job, limit))
                    except CgroupUnavailable as error:
                        self._print(f"capped: left out, no memory cgroup can be made here ({error})")
                        return {"missing": str(error)}
            times = {side: [run["token_s"] for run in found] for side, found in runs.items()}
            row = {"limit_bytes": limit, "ratio": quotients(times["llama.cpp"], times["moeflow"]), "runs": runs}
            self._print(f"capped, {name}: llama.cpp's time / ours {ranged(row['ratio'], 1, 4, 2)} (goal "
                        f"{GOALS['capped']}), {ranged(spread(times['moeflow']), 1e3, 8, 1)} and "
                        f"{ranged(spread(times['llama.cpp']), 1e3, 8, 1)} ms a token")  # fmt: skip
            rows[case] = row
        return rows

    def memory(self) -> dict:
        """Open the Q4_K_M file with a quarter of the experts, decode, and tell the peak of memory."""
        from moeflow.hf.model_folder import ModelFolder

        rows = {}
        for case in self.arguments.cases:
            file = self.file("q4_k_m", case)
            say(f"memory, {case}")
            job = {**self._job("memory", "moeflow", file), "task": "decode", "budget": "25%", "options": {}}
            found, dense = self._run(sys.executable, job), dense_bytes(ModelFolder(file).gguf)
            over = found["peak_bytes"] - found["budget_bytes"] - dense
            rows[case] = {"file_bytes": file.stat().st_size, "dense_bytes": dense, "over_bytes": over,
                          **{key: found[key] for key in ("peak_bytes", "budget_bytes", "step")}}  # fmt: skip
            self._print(f"memory, {case}: peak {found['peak_bytes'] / 1e6:.0f} MB = dense {dense / 1e6:.0f} + budget "
                        f"{found['budget_bytes'] / 1e6:.0f} + {over / 1e6:.0f} (goal at most "
                        f"{GOALS['memory_bytes'] / 1e6:.0f})")  # fmt: skip
        return rows

    def _job(self, name: str, engine: str, model: Path, **options: str) -> dict:
        from transformers import AutoTokenizer

        arguments = self.arguments
        prompt = AutoTokenizer.from_pretrained(arguments.model)(PROMPT, add_special_tokens=False)["input_ids"]
        step = {"predictor": None, "step": "auto", **options}
        return {"name": name, "engine": engine, "model": str(model), "gguf": str(model), "threads": arguments.threads,
                "prompt": prompt, "text": PROMPT, "budget": "100%", "tokens": arguments.tokens,
                "options": step}  # fmt: skip

    def _run(self, python: str, job: dict, limit_bytes: int | None = None) -> dict:
        """Run a job of gguf_job.py, under a limit where one is given."""
        before = os.environ.get("PYTHONPATH")
        os.environ |= {"OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": str(ROOT)}
        try:
            ended = run_process([python, str(JOB), json.dumps(job)], limit_bytes=limit_bytes, timeout_s=TIMEOUT_S)
        finally:
            os.environ |= {"PYTHONPATH": before or str(ROOT)}
        if ended.returncode:
            why = "killed at the limit" if ended.oom_killed else ended.stderr.strip()[-300:]
            raise SystemExit(f"{job['engine']} ended with exit code {ended.returncode}: {why}")
        return json.loads(ended.stdout.splitlines()[-1]) | {"cgroup_peak_bytes": ended.peak_bytes}

    def _print(self, text: str) -> None:
        if not self.arguments.json:
            print(text, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _prefix(first: list[int], second: list[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    return next((at for at, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
