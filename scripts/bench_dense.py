"""A linear of the dense parts: moeflow's kernel against torch's product, by dtype and number of tokens, in GFLOP/s.

    python scripts/bench_dense.py [--shape 2048x2048] [--tokens 1,16,64,256] [--rounds 15]

Both multiply the same matrix and take turns; their results are compared before they are timed.
"""

import argparse
import json


def main(argv: list[str] | None = None) -> int:
    """Print a table; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x2048", help="of the matrix, out x in features (2048x2048)")
    parser.add_argument("--tokens", default="1,16,64,256", help="numbers of tokens, with commas (1,16,64,256)")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(argv)

    import torch
    import torch.nn.functional as F

    from bench.machine import describe, print_card, software
    from bench.rounds import Case, quotients, spread, take_turns
    from moeflow.kernels.cpu.ahead import FEW_TOKENS, is_always_ahead
    from moeflow.kernels.cpu.ops import linear

    card = describe("torch")
    print_card({"processor": f"{card['cpu']}, {card['cores']} cores, load {card['load']:.1f}", "with": software(card)})
    rows, columns = map(int, arguments.shape.split("x"))
    results = []
    print("| dtype | tokens | torch | moeflow | moeflow / torch | who multiplies |\n|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = (torch.randn(rows, columns) / columns**0.5).to(dtype)
        for count in map(int, arguments.tokens.split(",")):
            x = torch.randn(count, columns).to(dtype)
            right, found = F.linear(x, weight), linear(x, weight, None)
            assert found is not None, "the compiled kernels are not here"
            error = float((found.double() - right.double()).norm() / right.double().norm())
            assert error < 8 * torch.finfo(dtype).eps, f"{dtype}, {count} tokens: {error}"
            flops = 2 * count * rows * columns
            cases = [
                Case("torch", lambda x=x, weight=weight: F.linear(x, weight), weight.nbytes),
                Case("moeflow", lambda x=x, weight=weight: linear(x, weight, None), weight.nbytes),
            ]
            times = take_turns(cases, arguments.rounds)
            rates = {name: spread([flops / second / 1e9 for second in seconds]) for name, seconds in times.items()}
            ratio = quotients(times["torch"], times["moeflow"])
            who = "moeflow" if count <= FEW_TOKENS or is_always_ahead(dtype) else "torch"
            name = str(dtype).rpartition(".")[2]
            results.append({"dtype": name, "tokens": count, "gflops": rates, "ratio": ratio, "who": who})
            print(
                f"| {name} | {count} | {rates['torch']['median']:.0f} | {rates['moeflow']['median']:.0f} | "
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {who} |"
            )
    print(json.dumps({"card": card, "shape": [rows, columns], "results": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
