"""What recording a trace costs: decode with and without it, in alternation, in one process.

The recorder is attached to and taken off the same loaded model, so that both sides run the same weights, cache and
threads. The last line is one JSON object; `ratio` is the median of the pairs' (time with) / (time without).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.token_times import TokenTimes
from moeflow.demo.model import default_demo_path
from moeflow.loading.load_moe import load_moe
from moeflow.trace.recorder import attach_recorder
from moeflow.trace.trace import RoutingTrace


def decode_s(model, prompt: torch.Tensor, num_tokens: int) -> tuple[float, torch.Tensor]:
    """Return seconds a decoded token and the tokens of a greedy answer."""
    clock = TokenTimes()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        streamer=clock,
    )
    # the prompt, the first token (prefill), then one a decode step
    return (clock.times[-1] - clock.times[1]) / (num_tokens - 1), tokens


def measure(args: argparse.Namespace, trace: Path) -> dict:
    """Run the pairs and return the figures."""
    model = load_moe(args.model, device=args.device, expert_memory=args.expert_memory)
    with model.moeflow as runtime:
        prompt = torch.arange(5, 5 + args.prompt_tokens, device=model.device)[None]
        _, expected = decode_s(model, prompt, args.tokens)  # warm-up
        pairs, begin = [], time.perf_counter()
        while len(pairs) < args.pairs and (len(pairs) < 5 or time.perf_counter() - begin < args.seconds):
            times = {}
            for side in (True, False) if len(pairs) % 2 else (False, True):
                recorder = attach_recorder(model, trace) if side else None
                times[side], tokens = decode_s(model, prompt, args.tokens)
                if side:
                    recorder.close()
                    runtime.observers.remove(recorder)
                assert torch.equal(tokens, expected), "recording changed the answer"
            pairs.append(times)
            say(f"pair {len(pairs)}: {1e3 * times[False]:.2f} ms without, {1e3 * times[True]:.2f} ms with")
    ratios = sorted(times[True] / times[False] for times in pairs)
    recorded = len(RoutingTrace.open(trace))
    assert recorded == len(pairs) * (args.prompt_tokens + args.tokens - 1), f"{recorded} tokens were recorded"
    return {
        "model": str(args.model),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "tokens": args.tokens,
        "pairs": len(pairs),
        "ms_per_token_without": 1e3 * statistics.median(times[False] for times in pairs),
        "ms_per_token_with": 1e3 * statistics.median(times[True] for times in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "recorded_tokens": recorded,
    }


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_demo_path(), help="checkpoint folder (the demo model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--expert-memory", default="100%", help="100%% by default: the fastest decode, the largest share"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode (48)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--pairs", type=int, default=15, help="most pairs of one run with and one without (15)")
    parser.add_argument("--seconds", type=float, default=60, help="no further pair after this long, but five (60)")
    parser.add_argument("--threads", type=int, help="torch threads; without it torch's own choice")
    args = parser.parse_args(argv)
    if args.tokens < 2 or args.pairs < 1 or args.prompt_tokens < 1:
        parser.error("--tokens must be at least 2, --pairs and --prompt-tokens at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder) / "trace.safetensors")
    print(
        f"decode, {figures['pairs']} pairs: {figures['ms_per_token_without']:.2f} ms a token without recording, "
        f"{figures['ms_per_token_with']:.2f} with; ratio {figures['ratio']:.4f} "
        f"({figures['ratio_low']:.4f} to {figures['ratio_high']:.4f})"
    )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
