"""What online pruning saves and costs: share of expert calls left out, and perplexity.

    python scripts/eval_pruning.py MODEL --text wikitext2/valid.txt --calibration books_train.txt.xz
        [--skipped .25,.5,.75] [--protected 0,.02] [--windows 16] [--window-tokens 512]

The model runs in float32; a skipped expert is one of weight 0. Thresholds come from the calibration text alone. The
last column is the standard error of the perplexity's change, over windows.
"""

import argparse
import json
import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_mixed import log_likelihood, read_text, text_windows
from moeflow.calibration.pruning_thresholds import calibrate_pruning
from moeflow.calibration.windows import cut_windows
from moeflow.hf import experts_interface
from moeflow.kernels.pruning import PruningThreshold, protected_tokens, prune


class Pruned:
    """Prunes a model's routes as they pass, and counts them."""

    def __init__(self, model, thresholds: list[PruningThreshold]):
        modules = [module for _, module in experts_interface.experts_modules(model)]
        self.calls = self.skipped = 0
        self._hooks = [
            module.register_forward_pre_hook(self._hook(threshold), with_kwargs=True)
            for module, threshold in zip(modules, thresholds, strict=True)
        ]

    def _hook(self, threshold):
        def change(module, args, kwargs):
            hidden_states, index, weights = experts_interface.experts_arguments(args, kwargs)
            protected = protected_tokens(hidden_states, threshold.norm)
            kept, weights = prune(index, weights, threshold.ratio, protected, num_experts=module.num_experts)
            self.calls += index.numel()
            self.skipped += int((kept == module.num_experts).sum())
            return (hidden_states, index, weights), {}

        return change

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text file, plain or xz; the Python standard library without it")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--skipped", default=".25,.5,.75")
    parser.add_argument("--protected", default="0,.02")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = text_windows(tokenizer, read_text(arguments.text), arguments.windows, arguments.window_tokens)
    text = read_text(arguments.calibration) if arguments.calibration else None
    calibration = cut_windows(tokenizer, text, arguments.calibration_tokens)

    whole = log_likelihood(model, windows)
    rows = [{"skipped": 0.0, "protected": 0.0, "saved": 0.0, "perplexity": math.exp(whole.mean())}]
    print("| ranks behind the first to skip | tokens protected | expert calls saved | perplexity | change | ± |")
    print("|---|---|---|---|---|---|")
    print(f"| none | | | {rows[0]['perplexity']:.3f} | | |", flush=True)
    for skipped in map(float, arguments.skipped.split(",")):
        for share in map(float, arguments.protected.split(",")):
            thresholds = calibrate_pruning(model, calibration, skipped_share=skipped, protected_share=share)
            pruned = Pruned(model, thresholds)
            losses = log_likelihood(model, windows)
            pruned.close()
            saved, difference = pruned.skipped / pruned.calls, losses - whole
            change, spread = np.expm1(difference.mean()), difference.std(ddof=1) / math.sqrt(len(difference))
            row = {"skipped": skipped, "protected": share, "saved": saved, "perplexity": math.exp(losses.mean())}
            rows.append(row)
            print(
                f"| {100 * skipped:.0f} % | {100 * share:.0f} % | {100 * saved:.1f} % | {row['perplexity']:.3f} "
                f"| {100 * change:+.2f} % | {100 * spread:.2f} % |",
                flush=True,
            )
    print(json.dumps({"model": arguments.model, "rows": rows}))


if __name__ == "__main__":
    main()
