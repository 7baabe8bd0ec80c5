"""Measure keys and values kept in int8 and int4: what they do to perplexity, and to the attention of a decode step.

    python scripts/bench_kv.py [MODEL] [--only perplexity attention] [--tokens 16384] [--window 1024] [--piece 256]
                               [--context 8192] [--rounds 15] [--steps 2] [--threads 1] [--quick] [--json]

Perplexity is that of WikiText-2's validation text through an engine's packed passes in pieces, so that keys and values
are read as they are kept; windows lie at equal distances over the text, and ratios carry their standard error over
windows, paired. Attention is that of native steps behind a context of random keys and values, formats in turns in one
process, for the model and for one wide layer shape (32 query heads, 8 of keys, 128 channels): ratios to the model's
dtype as median and range, and the time of reading the same bytes at the measured bandwidth. The model is the demo model
unless another folder is given. Progress goes to stderr; the last line is one JSON object.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from bench.ceilings import read_bandwidth
from bench.rounds import quotients, ranged, spread
from moeflow import Engine, SamplingParams, load_moe
from moeflow.demo.model import default_demo_path
from moeflow.engine.kv_cache.kv_format import FORMATS
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.sequence import Piece
from moeflow.hf.pretrained import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("perplexity", "attention")
WIDE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 4, "max_position_embeddings": 1 << 17,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print a table of each part, and one JSON object."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    found: dict = {}
    with ExitStack() as stack:
        model = load(args.model, stack)
        if "perplexity" in args.only:
            found["perplexity"] = bench_perplexity(model, args)
        if "attention" in args.only:
            bandwidth = read_bandwidth(args.quick)
            models = {"model": model, "wide": load(write_wide(stack), stack)}
            found["read_bytes_per_s"] = bandwidth
            found["attention"] = {name: bench_attention(name, one, bandwidth, args) for name, one in models.items()}
    if not args.json:
        print_tables(found)
    print(json.dumps(found))
    return 0


def load(folder, stack: ExitStack):
    """Load a model with all its experts in memory; it is closed at the end."""
    model = load_moe(folder, expert_memory="100%", predictor=None, device="cpu")
    stack.enter_context(model.moeflow)
    return model


def write_wide(stack: ExitStack) -> Path:
    """Write a random model of two wide attention layers and hardly anything else."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    MixtralForCausalLM(MixtralConfig(**WIDE)).bfloat16().save_pretrained(folder)
    return folder


def bench_perplexity(model, args: argparse.Namespace) -> dict:
    """Return perplexity by format, and its ratio to that of the model's dtype."""
    ids = load_tokenizer(args.model)(args.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    wanted, available = max(args.tokens // args.window, 2), len(ids) // args.window
    places = [number * available // wanted * args.window for number in range(min(wanted, available))]
    losses: dict[str, list[float]] = {}
    for name in args.formats:
        begin = time.perf_counter()
        with Engine(
            model, max_batch_size=1, max_step_tokens=args.piece, share_prefixes=False, kv_format=name
        ) as engine:
            losses[name] = [loss(engine, ids[place : place + args.window]) for place in places]
        say(
            f"perplexity in {name}: {math.exp(statistics.mean(losses[name])):.3f} ({time.perf_counter() - begin:.0f} s)"
        )
    rows = {}
    for name, mine in losses.items():
        differences = [a - b for a, b in zip(mine, losses["auto"], strict=True)]
        ratio = math.exp(statistics.mean(differences))
        rows[name] = {
            "perplexity": math.exp(statistics.mean(mine)),
            "change_percent": 100 * (ratio - 1),
            "error_percent": 100 * ratio * statistics.stdev(differences) / math.sqrt(len(differences)),
            "windows": len(mine),
        }
    return rows


def loss(engine: Engine, ids: list[int]) -> float:
    """Return the mean loss of a text's tokens, in nats."""
    (completion,) = engine.generate([ids], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    assert completion.error is None, completion.error
    return -statistics.mean(chosen for chosen, _ in completion.prompt_logprobs[1:])


class Decoding:
    """A sequence that decodes behind a context of random keys and values, kept in a format."""

    def __init__(self, model, name: str, args: argparse.Namespace) -> None:
        num_new = (args.rounds + 3) * args.steps + 8
        ids = torch.randint(3, model.config.vocab_size, (args.context,)).tolist()
        self.step = model.moeflow.step
        self.runner = ModelRunner(model, 64 << 30, kv_format=name)
        self.sequence = self.runner.sequence("one", ids, num_new)
        assert self.runner.memory.admit(self.sequence)
        slot, generator = self.runner.memory["one"], torch.Generator().manual_seed(0)
        for layer, shape in slot.layout.items():
            for begin in range(0, args.context, 1024):
                count = min(1024, args.context - begin)
                both = [
                    torch.randn(1, heads, count, width, generator=generator).to(shape.dtype)
                    for heads, width in (shape.key, shape.value)
                ]
                slot.write(layer, begin, *both)
        self.sequence.num_computed = args.context
        self.num_steps = args.steps
        self.num_bytes = args.context * self.runner.memory.position_bytes

    def run(self) -> tuple[float, float]:
        """Run some steps; return the seconds of attention and of everything, a step."""
        before, begin = self.step.seconds.get("attend", 0.0), time.perf_counter()
        for _ in range(self.num_steps):
            self.sequence.append(5)
            assert self.runner.memory.grow(self.sequence)
            (computed,) = self.runner.run([Piece(self.sequence, [5], True)])
            assert computed.error is None, computed.error
            assert self.runner.was_native, "the model's steps do not run natively"
            self.sequence.num_computed += 1
        whole = time.perf_counter() - begin
        return (self.step.seconds["attend"] - before) / self.num_steps, whole / self.num_steps


def bench_attention(label: str, model, bandwidth: float, args: argparse.Namespace) -> dict:
    """Return by format the milliseconds of attention and of a step, and how many times as fast they are."""
    say(f"attention of {label} behind {args.context:,} positions")
    cases = {name: Decoding(model, name, args) for name in args.formats}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for turn in range(args.rounds + 1):
        for name, case in cases.items():
            taken = case.run()
            if turn:
                times[name].append(taken)
    rows = {}
    for name, case in cases.items():
        ratios = [
            quotients([one[side] for one in times["auto"]], [one[side] for one in times[name]]) for side in (0, 1)
        ]
        rows[name] = {
            "attention_ms": spread([1e3 * one[0] for one in times[name]]),
            "step_ms": spread([1e3 * one[1] for one in times[name]]),
            "times_as_fast": ratios[0],
            "step_times_as_fast": ratios[1],
            "mbytes": case.num_bytes / 1e6,
            "ceiling_ms": 1e3 * case.num_bytes / bandwidth,
        }
    return rows


def print_tables(found: dict) -> None:
    """Print the parts as markdown."""
    if "perplexity" in found:
        print("| kept in | perplexity | change |\n|---|---|---|")
        for name, row in found["perplexity"].items():
            print(f"| {name} | {row['perplexity']:.3f} | {row['change_percent']:+.2f} % ± {row['error_percent']:.2f} |")
        print()
    for label, rows in found.get("attention", {}).items():
        print(
            f"| {label}, kept in | MB read | ms | times as fast | at memory's speed, ms | whole step, times as fast |"
        )
        print("|---|---|---|---|---|---|")
        for name, row in rows.items():
            cells = [ranged(row["attention_ms"], 1, 1, 2), ranged(row["times_as_fast"], 1, 1, 2)]
            more = [f"{row['ceiling_ms']:.2f}", ranged(row["step_times_as_fast"], 1, 1, 2)]
            print("| " + " | ".join([name, f"{row['mbytes']:.1f}", *cells, *more]) + " |")
        print()


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench_kv: {text}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    data = Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_demo_path(), help="folder (the demo model)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--text", type=Path, default=data / "wikitext2" / "valid.txt")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text (16384)")
    parser.add_argument("--window", type=int, default=1024, help="tokens predicted from one beginning (1024)")
    parser.add_argument("--piece", type=int, default=256, help="tokens of a pass (256)")
    parser.add_argument("--context", type=int, default=8192, help="positions behind which steps are timed (8192)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="of each format in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    args.formats = ["auto", *args.formats]
    if args.quick:
        args.tokens, args.window, args.piece, args.context, args.rounds, args.steps = 256, 128, 32, 600, 2, 1
    return args


if __name__ == "__main__":
    sys.exit(main())
