"""Measure what structured output costs: mask and commit of a token, as a share of a decode step.

    python scripts/bench_structure.py MODEL [--memory 25% 100%] [--tokens 200] [--threads 1]

An answer under a schema of 20 fields is generated at temperature 1. Its tokens are then followed again by a matcher
alone, with a mask of logits for each token that is not forced: the median over five times is the cost. The step is that
of the same engine, one sequence, without a schema. The last line is one JSON object.
"""

import argparse
import json

import torch

from bench.structure_cost import schema_cost


def main(argv=None) -> None:
    """Print a line for each memory, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, such as the demo model")
    parser.add_argument("--memory", nargs="+", default=["25%", "100%"], help="expert_memory")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = {}
    for memory in arguments.memory:
        figures = found[memory] = schema_cost(arguments.model, memory, arguments.tokens)
        print(
            f"{memory:>5} resident: {figures['token_us']:.0f} us a token of {figures['step_ms']:.1f} ms a step, "
            f"{figures['share']:.2%}; {figures['tokens']} tokens in {figures['passes']} passes",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
