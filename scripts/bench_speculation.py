"""Measure what speculation makes of an engine's speed: gated, ungated and off, in turns, by kind of prompt.

    python scripts/bench_speculation.py MODEL [--memory 100% 25%] [--tokens 128] [--prompts 4] [--kinds KIND ..]
                                        [--modes gated ungated "off again"] [--rounds 3] [--quick] [--generate]

Prompts are those of Spec-Bench's categories and HumanEval's, asked to be written again, under $MOEFLOW_TEST_DATA; where
they are not there, one of each of a few kinds. A line says the tokens a second of each mode as ratios to none (median,
least and most of the rounds; "off again" tells what chance does), the share of proposed tokens that were accepted, and
what seven drafted tokens made of a step's time. Answers are checked to be the same. The last line is one JSON object.

--generate measures `model.generate` in place of an engine: plain, with prompt lookup ungated (as transformers does it),
and gated.
"""

import argparse
import gzip
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

from moeflow import Engine, SamplingParams, load_moe
from moeflow.hf.pretrained import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODES = {"gated": {"gated": True}, "ungated": {"gated": False}, "off again": None}
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return width * "
BUILT_IN = {
    "code edit": [f"Rewrite this:\n{CODE}height * depth\n\nRewritten:\n{CODE}"],
    "summary": ["The river rose in the night. In the morning the bridge was gone. In short: The river rose in the"],
    "story": ["Once upon a time there was a"],
}


def prompts_of(data: Path, most: int) -> dict[str, list[str]]:
    """Return prompts by kind, at most so many of each."""
    found: dict[str, list[str]] = {}
    spec_bench, human_eval = data / "prompts/spec_bench.jsonl", data / "prompts/HumanEval.jsonl.gz"
    if not spec_bench.exists() or not human_eval.exists():
        return BUILT_IN
    for line in spec_bench.read_text().splitlines():
        question = json.loads(line)
        found.setdefault(question["category"], []).append(question["turns"][0])
    with gzip.open(human_eval, "rt") as file:
        codes = [json.loads(line) for line in file]
    found["code edit"] = [f"{one['prompt']}{one['canonical_solution']}\nRewrite this:\n" for one in codes]
    return {kind: prompts[:most] for kind, prompts in found.items()}


def speed(engine: Engine, prompts: list[str], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Answer prompts one after the other; return tokens a second behind each one's first, and the tokens."""
    seconds, count, answers = 0.0, 0, []
    for prompt in prompts:
        begin = None
        tokens: list[int] = []
        for output in engine.outputs(prompt, params):
            tokens += output.token_ids
            begin = begin or time.perf_counter()
        seconds += time.perf_counter() - (begin or 0.0)
        count += len(tokens) - 1
        answers.append(tokens)
    return count / seconds, answers


def compare(model, tokenizer, prompts: list[str], modes: list[str], num_tokens: int, rounds: int) -> dict:
    """Return the ratios of modes to "off", round by round, and what became of drafts."""
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    options = {"off": None} | {mode: MODES[mode] for mode in modes}
    engines = {
        mode: Engine(
            model, tokenizer, max_batch_size=1, max_step_tokens=1 << 16, speculation=option, share_prefixes=False
        )
        for mode, option in options.items()
    }
    for engine in engines.values():
        speed(engine, prompts[:1], params)
    ratios: dict[str, list[float]] = {mode: [] for mode in options}
    for number in range(rounds):
        speeds, answers = {}, {}
        turn = number % len(options)
        for mode in [*list(options)[turn:], *list(options)[:turn]]:
            speeds[mode], answers[mode] = speed(engines[mode], prompts, params)
        assert all(answer == answers["off"] for answer in answers.values()), "answers differ"
        for mode in options:
            ratios[mode].append(speeds[mode] / speeds["off"])
    found: dict = {"ratios": ratios}
    for mode, engine in engines.items():
        found[mode] = engine.stats()["speculation"]
        engine.close()
    return found


def generate_speed(model, tokenizer, prompts: list[str], num_tokens: int, most: int | None) -> tuple[float, list]:
    """Answer prompts by `model.generate`; return tokens a second, prompts' passes included, and the tokens."""
    lookup = {} if most is None else {"prompt_lookup_num_tokens": most}
    answers, begin = [], time.perf_counter()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
        answers.append(model.generate(ids, **options, **lookup)[0].tolist())
    return num_tokens * len(prompts) / (time.perf_counter() - begin), answers


def compare_generate(model, ungated, tokenizer, prompts: list[str], num_tokens: int, rounds: int) -> dict:
    """Return the ratios to plain `generate`, round by round, and what became of the gate's drafts.

    The first round, in which programs are made, does not count.
    """
    runs = {"plain": (model, None), "gated": (model, 7), "ungated": (ungated, 7)}
    ratios: dict[str, list[float]] = {mode: [] for mode in runs}
    for number in range(1 + rounds):
        speeds, answers = {}, {}
        turn = number % len(runs)
        for mode in [*list(runs)[turn:], *list(runs)[:turn]]:
            one, most = runs[mode]
            speeds[mode], answers[mode] = generate_speed(one, tokenizer, prompts, num_tokens, most)
        assert answers["gated"] == answers["plain"], "answers differ"
        for mode in runs if number else ():
            ratios[mode].append(speeds[mode] / speeds["plain"])
    return {"ratios": ratios, "gated": model.moeflow.stats()["speculation"], "ungated": {"sources": {}}}


def main(argv=None) -> None:
    """Print a line for each memory and kind of prompt, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, such as the demo model")
    parser.add_argument("--memory", nargs="+", default=["100%", "25%"], help="expert_memory")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--kinds", nargs="+", help="of prompts; without it all")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["gated", "ungated"], help="beside off")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one short answer of each kind, once")
    parser.add_argument("--generate", action="store_true", help="measure model.generate in place of an engine")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT / "../shared/data")))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.prompts, arguments.rounds = 24, 1, 1
    torch.set_num_threads(arguments.threads)
    kinds = prompts_of(arguments.data, arguments.prompts)
    if arguments.generate:
        arguments.modes = ["gated", "ungated"]
    if arguments.kinds:
        unknown = set(arguments.kinds) - kinds.keys()
        if unknown:
            parser.error(f"there are no prompts of {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
        kinds = {kind: kinds[kind] for kind in arguments.kinds}
    tokenizer, results = load_tokenizer(arguments.model), {}
    for memory in arguments.memory:
        options = {"expert_memory": memory, "device": "cpu"}
        model, ungated = load_moe(arguments.model, **options), None
        if arguments.generate:
            ungated = load_moe(arguments.model, **options, speculation="off")
        with model.moeflow, nullcontext() if ungated is None else ungated.moeflow:
            for kind, prompts in kinds.items():
                size = arguments.tokens, arguments.rounds
                if ungated is None:
                    found = compare(model, tokenizer, prompts, arguments.modes, *size)
                else:
                    found = compare_generate(model, ungated, tokenizer, prompts, *size)
                results[f"{memory} {kind}"] = found
                told = []
                for mode in arguments.modes:
                    ratios, counts = found["ratios"][mode], found[mode]["sources"].get("prompt_lookup")
                    text = f"{mode} {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                    if counts is not None:
                        share = counts["accepted"] / max(counts["proposed"], 1)
                        text += f", {share:.0%} accepted of {counts['proposed']}"
                    told.append(text)
                if "ungated" in arguments.modes and not arguments.generate:
                    growth = found["ungated"]["growth"].get("1+7")
                    told.append("no step with seven" if growth is None else f"seven drafted take {growth:.2f} steps")
                print(f"{memory:>5} {kind}: {'; '.join(told)}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
