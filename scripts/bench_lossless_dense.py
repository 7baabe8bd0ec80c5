"""Times a model's dense linears, one token each, with bfloat16 weights and with weights kept in the lossless format.

    python scripts/bench_lossless_dense.py MODEL [--rounds N]

Both ways in turns in one process; prints medians, their ratio (the median over paired rounds) and the bytes of each.
"""

import argparse
import copy
import time
from statistics import median

import torch

from moeflow import load_moe
from moeflow.hf.dense_kernels import FewTokensLinear
from moeflow.hf.passes.lossless_dense import compress_dense


def _seconds(linears: torch.nn.ModuleList, tokens: list[torch.Tensor]) -> float:
    begin = time.perf_counter()
    for linear, token in zip(linears, tokens, strict=True):
        linear(token)
    return time.perf_counter() - begin


@torch.no_grad()
def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    model = load_moe(args.model, device="cpu", predictor=None, step="python")
    plain = torch.nn.ModuleList(module for module in model.modules() if type(module) is FewTokensLinear)
    stored = copy.deepcopy(plain)
    before = sum(linear.weight.nbytes for linear in plain)
    saved = compress_dense(stored)
    tokens = [torch.randn(1, linear.in_features).bfloat16() for linear in plain]
    rounds = [(_seconds(plain, tokens), _seconds(stored, tokens)) for _ in range(args.rounds)]
    columns = [1000 * median(column) for column in zip(*rounds, strict=True)]
    ratio = median(first / second for first, second in rounds)
    print(f"{len(plain)} linears, {before} bytes in bfloat16, {before - saved} kept: {(before - saved) / before:.3f}")
    print(f"one token: {columns[0]:.2f} ms in bfloat16, {columns[1]:.2f} ms kept; {ratio:.2f} times as fast")
    model.moeflow.close()


if __name__ == "__main__":
    main()
