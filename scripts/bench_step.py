"""Measure decoding with every expert in memory: native steps against Python's, transformers eager and llama.cpp.

Each engine lives in a process of its own and decodes when it is asked; engines take turns, so that a noisy machine
touches them alike, and ratios are taken turn by turn. Greedy, one sequence, end-of-text ignored; a token's time is the
median between two tokens. Beside it stands what memory allows: the bytes of weights a step reads, at the bandwidth that
the kernels' own reader measures before each turn. llama.cpp is left out without --llama-python.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench.fine_grained import cut_experts
from bench.machine import describe, print_card, software
from bench.rounds import quotients, ranged, spread
from bench.worker import Worker

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
MATRICES = ("linear", "experts")
FORMATS = {"": "f16", "int8": "q8_0", "int4-g64": "q4_0"}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Mixtral checkpoint; without it the demo model")
    parser.add_argument("--work", type=Path, help="folder of models made from it (bench/ beside the demo model)")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python, gguf, numpy and psutil")
    parser.add_argument("--cases", nargs="+", default=["bf16", "fine", "int8", "int4-g64"],
                        help="of bf16, fine (every expert cut in two), int8, int4-g64 (all)")  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of every engine (1 2)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a turn (32)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each engine (7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
    arguments = parser.parse_args(argv)
    from moeflow.demo.model import default_demo_path

    model = arguments.model or default_demo_path()
    arguments.work = arguments.work or default_demo_path().parent / "bench"
    card = describe("torch", "transformers")
    if not arguments.json:
        print_card({"machine": f"{card['cpu']}, {card['cores']} cores, load {card['load']:.1f}",
                    "software": software(card), "model": model.name})  # fmt: skip
    results = []
    for case in arguments.cases:
        for threads in arguments.threads:
            results.append(run_case(arguments, model, case, threads))
            if not arguments.json:
                print_case(results[-1])
    if arguments.json:
        print(json.dumps({"machine": card, "results": results}))
    return 0


def run_case(arguments: argparse.Namespace, model: Path, case: str, threads: int) -> dict:
    """Let the engines of one case take turns."""
    if case == "fine":
        model = cut_experts(model, arguments.work / f"{model.name}-fine")
    quantization = case if case in FORMATS else ""
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
    common = {"model": str(model), "threads": threads, "prompt": prompt, "text": PROMPT, "budget": "100%"}
    common["tokens"] = arguments.tokens
    jobs = []
    if not quantization:
        jobs.append((sys.executable, {"name": "transformers eager", "engine": "transformers"}))
    for step in ("python", "auto"):
        options = {"predictor": None, "step": step, "quantization": quantization or None}
        name = "moeflow native step" if step == "auto" else "moeflow Python step"
        jobs.append((sys.executable, {"name": name, "engine": "moeflow", "options": options}))
    if arguments.llama_python:
        experts = FORMATS[quantization]
        from bench.gguf_file import gguf_of

        gguf = str(gguf_of(model, arguments.work, experts))
        jobs.append((arguments.llama_python, {"name": f"llama.cpp {experts}", "engine": "llama", "gguf": gguf}))
    workers = []
    for python, job in jobs:
        say(f"{case}, {threads} threads: loading {job['name']}")
        workers.append(Worker(python, {**common, **job}))
    answers: dict[str, list[dict]] = {worker.name: [] for worker in workers}
    for turn in range(arguments.rounds + 1):
        say(f"{case}, {threads} threads: turn {turn} of {arguments.rounds}")
        for worker in workers:
            answer = worker.decode(arguments.tokens)
            if turn:
                answers[worker.name].append(answer)
    for worker in workers:
        worker.end()
    native = next(worker for worker in workers if worker.name == "moeflow native step")
    return {"case": case, "threads": threads, "bytes": native.ready["bytes"],
            "instruction_set": native.ready["instruction_set"], "answers": answers}  # fmt: skip


def print_case(result: dict) -> None:
    """Print one case's tables."""
    times = {name: [answer["token_s"] for answer in answers] for name, answers in result["answers"].items()}
    native = result["answers"]["moeflow native step"]
    bandwidth = [answer["read_bytes_per_s"] for answer in native]
    floor = [result["bytes"] / rate for rate in bandwidth]
    print(f"== {result['case']}, {result['threads']} threads, kernels {result['instruction_set']}; a step reads "
          f"{result['bytes'] / 1e6:.0f} MB, memory {ranged(spread(bandwidth), 1e-9, 4, 1)} GB/s")  # fmt: skip
    print(f"{'engine':22} {'ms a token':>26} {'its time / native step':>26} {'x memory':>22}")
    for name, found in times.items():
        print(f"{name:22} {ranged(spread(found), 1e3, 8, 2):>26} "
              f"{ranged(quotients(found, times['moeflow native step']), 1, 6, 2):>26} "
              f"{ranged(quotients(found, floor), 1, 6, 2):>22}")  # fmt: skip
    same = {}
    expected = next(iter(result["answers"].values()))[0]["tokens"]
    for name, answers in result["answers"].items():
        pairs = zip(expected, answers[0]["tokens"], strict=True)
        same[name] = next((at for at, (a, b) in enumerate(pairs) if a != b), len(expected))
    print("first tokens equal to the first engine's: " + ", ".join(f"{name} {count}" for name, count in same.items()))
    steps = [answer["step"] for answer in native]
    kinds = {kind: statistics.median(step["kinds_s"].get(kind, 0) for step in steps) for kind in steps[0]["kinds_s"]}
    walls = [step["mean_step_s"] for step in steps]
    matrices = [sum(step["kinds_s"].get(kind, 0) for kind in MATRICES) for step in steps]
    rest = [1 - a / b for a, b in zip(matrices, walls, strict=True)]
    around = [answer["token_s"] - answer["step"]["step_s"] for answer in native]
    print("a native step by kind, ms: " + ", ".join(f"{kind} {1e3 * taken:.3f}" for kind, taken in kinds.items()))
    print(f"of a step outside {' and '.join(MATRICES)}: {ranged(spread(rest), 100, 4, 1)} %")
    print(f"{steps[0]['instructions']} instructions and {steps[0]['native_calls']:.1f} calls of the library a step")
    print(f"generate's own Python around a step: {ranged(spread(around), 1e3, 5, 2)} ms a token\n", flush=True)


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
