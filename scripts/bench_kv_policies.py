"""Measure policies of keys and values: what they do to perplexity behind long contexts, what they hold and attend to.

    python scripts/bench_kv_policies.py [MODEL] [--policies P ..] [--tokens 4096] [--windows 2] [--piece 256] [--quick]
                                        [--json]

Perplexity is that of WikiText-2's validation text, through an engine's packed passes in pieces, in windows of so many
tokens at equal distances over the text: of all tokens, and of the second half of each window, whose contexts are long.
Ratios are to the engine without a policy. Bytes are the most that a sequence held. The share is that of the positions
before each token that it attended to, over layers and heads. The model is the demo model unless another folder is
given. Nothing is timed. Progress goes to stderr; the last line is one JSON object.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch

from moeflow import Engine, SamplingParams, load_moe
from moeflow.demo.model import default_demo_path
from moeflow.hf.pretrained import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
POLICIES = [
    "none", "sinks:sinks=4,window=1020", "heavy_hitters:budget=1024,recent=512", "pages:page=16,pages=64",
    "sinks:sinks=4,window=508", "heavy_hitters:budget=512,recent=256", "pages:page=16,pages=32",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print a table and one JSON object."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    ids = load_tokenizer(args.model)(args.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    step = len(ids) // args.windows
    texts = [ids[number * step : number * step + args.tokens] for number in range(args.windows)]
    model = load_moe(args.model, expert_memory="100%", predictor=None, device="cpu")
    with model.moeflow:
        rows = {name: measure(model, texts, name, args) for name in args.policies}
    for row in rows.values():
        row["ratio"], row["late_ratio"] = (row[name] / rows["none"][name] for name in ("perplexity", "late_perplexity"))
        row["bytes_ratio"] = row["kv_peak_bytes"] / rows["none"]["kv_peak_bytes"]
    if not args.json:
        print("| policy | perplexity | ratio | second half | ratio | MB held | ratio | attended |")
        print("|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            cells = [f"{row[key]:.3f}" for key in ("perplexity", "ratio", "late_perplexity", "late_ratio")]
            cells += [f"{row['kv_peak_bytes'] / 1e6:.1f}", f"{row['bytes_ratio']:.2f}", f"{row['attended_share']:.2f}"]
            print(f"| `{name}` | {' | '.join(cells)} |")
        print()
    print(json.dumps({"tokens": args.tokens, "windows": args.windows, "policies": rows}))
    return 0


def measure(model, texts: list[list[int]], name: str, args: argparse.Namespace) -> dict:
    """Return perplexity, bytes and the share attended under a policy."""
    policy = None if name == "none" else name
    losses: list[list[float]] = []
    with Engine(model, max_batch_size=1, max_step_tokens=args.piece, share_prefixes=False, kv_policy=policy) as engine:
        for text in texts:
            (completion,) = engine.generate([text], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
            assert completion.error is None, completion.error
            losses.append([-chosen for chosen, _ in completion.prompt_logprobs[1:]])
        stats = engine.stats()
    every, late = ([loss for text in losses for loss in text[begin:]] for begin in (0, args.tokens // 2))
    row = {
        "perplexity": math.exp(statistics.mean(every)),
        "late_perplexity": math.exp(statistics.mean(late)),
        "kv_peak_bytes": stats["kv_peak_bytes"],
        "attended_share": 1.0 if policy is None else stats["kv_policy"]["attended_share"],
    }
    print(f"bench_kv_policies: {name}: {row['perplexity']:.3f}", file=sys.stderr, flush=True)
    return row


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    data = Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_demo_path(), help="folder (the demo model)")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="as the values of kv_policy")
    parser.add_argument("--text", type=Path, default=data / "wikitext2" / "valid.txt")
    parser.add_argument("--tokens", type=int, default=4096, help="of a window (4096)")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--piece", type=int, default=256, help="tokens of a pass (256)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.windows, args.piece = 256, 1, 64
        args.policies = [
            "sinks:sinks=4,window=60",
            "heavy_hitters:budget=64,recent=32,block=16",
            "pages:page=8,pages=8",
        ]
    args.policies = ["none", *(name for name in args.policies if name != "none")]
    return args


if __name__ == "__main__":
    sys.exit(main())
