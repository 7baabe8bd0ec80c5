"""Measure a conversation that grows in one budget of experts and keys and values, against budgets that stand still.

    python scripts/bench_memory.py MODEL [--memory 1000MB] [--lengths 256 512 1024 2048 4096] [--rounds 3] [--quick]

Each prompt is the one before, its answer, and this repository's documentation up to the length. At each length it
decodes some tokens, and the tokens a second behind the first are taken, with the experts that were fetched meanwhile.
`shared` is load_moe(memory=); a fixed split has the bytes of so many positions as kv_memory and the rest as
expert_memory, so that it ends where its keys and values do. A line says, for each length, the speed of all, and what
the shared budget reaches of the best split that is still there (median, least and most of the rounds).
The ways run in turns; their first answers are checked to be the same (later ones go on with what was kept, so that
prompts are cut elsewhere and last bits may differ). The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from moeflow import Engine, SamplingParams, load_moe
from moeflow.hf.pretrained import load_tokenizer
from moeflow.memory_size import parse_bytes

ROOT = Path(__file__).resolve().parent.parent
SPARE = 1.25  # of a split's positions: a slot has some beyond its sequence's tokens


def say(text: str) -> None:
    """Tell how far it is, beside the figures."""
    print(text, file=sys.stderr, flush=True)


def conversation(model: str, num_tokens: int) -> list[int]:
    """Return that many tokens of the documentation."""
    text = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = load_tokenizer(model)(text[: 8 * num_tokens])["input_ids"]
    assert len(ids) >= num_tokens, f"the documentation has {len(ids)} tokens, {num_tokens} are asked for"
    return ids[:num_tokens]


def position_bytes(model: str) -> int:
    """Return the bytes of keys and values of one position."""
    loaded = load_moe(model, device="cpu", predictor=None)
    with loaded.moeflow, Engine(loaded) as engine:
        return engine.stats()["kv_position_bytes"]


def run(model: str, options: dict, ids: list[int], lengths: list[int], num_tokens: int) -> dict:
    """Let the conversation grow to each length.

    Returns:
        "speeds", "answers", "slots" and "misses", [lengths]: tokens a second, None where the budget ends, slots of
        experts, and experts fetched for a token decoded; and "memory", as the runtime tells of it.
    """
    loaded = load_moe(model, device="cpu", **options)
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    found: dict = {"speeds": [], "answers": [], "slots": [], "misses": []}
    with loaded.moeflow as runtime, Engine(loaded, max_batch_size=1) as engine:
        engine.generate([ids[8:24]], SamplingParams(max_new_tokens=4, ignore_eos=True))  # the step's program is there
        said: list[int] = []
        for length in lengths:
            begin, answer, error = None, [], None
            said += ids[len(said) : length - num_tokens]
            misses = runtime.snapshot().decode.misses
            for output in engine.outputs(said, params):
                answer += output.token_ids
                begin = begin or time.perf_counter()
                error = output.completion and output.completion.error
            seconds = time.perf_counter() - (begin or 0.0)
            found["speeds"].append(None if error else (len(answer) - 1) / seconds)
            found["answers"].append(None if error else answer)
            said += answer
            found["misses"].append((runtime.snapshot().decode.misses - misses) / max(1, len(answer) - 1))
            found["slots"].append(runtime.stats()["slots"])
        stats = engine.stats()
        found |= {"memory": runtime.stats()["memory"], "kv_peak_bytes": stats["kv_peak_bytes"]}
        found |= {"kept_hits": stats["kept_hits"]}
    return found


def ways_of(total: int, per_position: int, splits: list[int]) -> dict[str, dict]:
    """Return options of load_moe by the name of a way."""
    ways: dict[str, dict] = {"shared": {"memory": total}}
    for positions in splits:
        values = int(SPARE * positions * per_position)
        ways[f"fixed {positions}"] = {"expert_memory": total - values, "kv_memory": values}
    return ways


def main(argv=None) -> None:
    """Print a line for each length and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, such as the demo model")
    parser.add_argument("--memory", default="1000MB", help="of experts, keys and values together")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--splits", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="positions")
    parser.add_argument("--tokens", type=int, default=32, help="decoded at each length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two lengths and splits, a few tokens, once")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.lengths, arguments.splits, arguments.tokens, arguments.rounds = [128, 256], [128, 256], 8, 1
    torch.set_num_threads(arguments.threads)
    total, lengths = parse_bytes(arguments.memory, name="--memory"), sorted(arguments.lengths)
    ids = conversation(arguments.model, lengths[-1])
    ways = ways_of(total, position_bytes(arguments.model), arguments.splits)
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            say(f"round {number + 1} of {arguments.rounds}: {name}")
            runs[name].append(run(arguments.model, ways[name], ids, lengths, arguments.tokens))
    results: dict = {"memory_bytes": total, "ways": ways, "lengths": {}}
    for place, length in enumerate(lengths):
        answers = {str(one["answers"][place]) for found in runs.values() for one in found if one["answers"][place]}
        assert len(answers) == 1 or place, "answers differ"
        speeds = {name: [one["speeds"][place] for one in found] for name, found in runs.items()}
        fixed = {name: found for name, found in speeds.items() if name != "shared" and None not in found}
        best = max(fixed, key=lambda name: median(fixed[name]), default=None)
        counts = {kind: {name: found[0][kind][place] for name, found in runs.items()} for kind in ("slots", "misses")}
        row: dict = {"speeds": speeds, **counts}
        told = ", ".join(f"{name} {median(found):.2f}" for name, found in {"shared": speeds["shared"], **fixed}.items())
        line = f"{length:6} positions: {told} tokens a second"
        if best is not None:
            ratios = [one / other for one, other in zip(speeds["shared"], fixed[best], strict=True)]
            row |= {"best": best, "ratios": ratios}
            line += f"; {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of {best}"
        results["lengths"][length] = row
        if not arguments.json:
            print(line, flush=True)
    results["peak_bytes"] = max(one["memory"]["shared_peak_bytes"] for one in runs["shared"])
    results["within"] = results["peak_bytes"] <= total
    if not arguments.json:
        print(f"at most {results['peak_bytes'] / 1e6:.0f} MB of experts, keys and values, of {total / 1e6:.0f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
