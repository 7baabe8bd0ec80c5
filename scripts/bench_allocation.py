"""Measure the choice of widths at the size of a large model: its time, and its cost against simpler choices.

    python scripts/bench_allocation.py [--layers 58] [--experts 256] [--bits 2.5] [--gap 0.01] [--repeats 5]

Costs are random with the shape of real ones: access skewed between experts, layers of unequal weight, an error that
falls about four times a bit. Budget: what uniform widths of `--bits` on average would take. Seconds include building
the program. The bound is checked by a search over prices of a byte, apart from the solver.
"""

import argparse
import json
import statistics

import numpy as np

from moeflow.convert.bit_allocation import allocate, dual_bound, relative_gap
from moeflow.kernels.quantization.formats import find_format

WIDTHS = (1, 2, 3, 4, 8)
SHAPES = ((4096, 7168), (7168, 2048))  # gate and up, down: an expert of DeepSeek-V3


def random_costs(num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Return [L, E, B] costs: gamma-distributed access, lognormal layers and experts, error falling with the bits."""
    rng = np.random.default_rng(seed)
    access = rng.gamma(0.5, size=(num_layers, num_experts, 1))
    layers = np.exp(rng.normal(size=(num_layers, 1, 1)))
    falling = 4.0 ** -np.array(WIDTHS) * np.exp(0.3 * rng.normal(size=(num_layers, num_experts, len(WIDTHS))))
    return access * layers * falling


def greedy(costs, sizes, budget) -> float:
    """Widen the expert whose next width saves the most, until nothing fits; return the cost."""
    import heapq

    rows = costs.reshape(-1, costs.shape[-1])
    room = budget - len(rows) * int(sizes[0])
    at = np.zeros(len(rows), int)
    heap = [(row[1] - row[0], expert) for expert, row in enumerate(rows)]
    heapq.heapify(heap)
    while heap:
        _, expert = heapq.heappop(heap)
        more = int(sizes[at[expert] + 1] - sizes[at[expert]])
        if more > room:
            continue
        room -= more
        at[expert] += 1
        if at[expert] + 1 < len(sizes):
            heapq.heappush(heap, (rows[expert, at[expert] + 1] - rows[expert, at[expert]], expert))
    return float(rows[np.arange(len(rows)), at].sum())


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    costs = random_costs(arguments.layers, arguments.experts)
    sizes = np.array([sum(find_format(f"int{bits}-g64").num_bytes(shape) for shape in SHAPES) for bits in WIDTHS])
    count = costs.shape[0] * costs.shape[1]
    low = max(bits for bits in WIDTHS[:-1] if bits <= arguments.bits)
    high = WIDTHS[WIDTHS.index(low) + 1]
    share = (arguments.bits - low) / (high - low)
    between = (1 - share) * sizes[WIDTHS.index(low)] + share * sizes[WIDTHS.index(high)]
    budget = int(count * between)

    uniform = float(costs[..., WIDTHS.index(low)].sum())
    alternating = float(
        (1 - share) * costs[..., WIDTHS.index(low)].sum() + share * costs[..., WIDTHS.index(high)].sum()
    )
    rows = {
        f"uniform {low} bits (fewer bytes)": {"cost": uniform},
        f"{low} and {high} bits drawn by lot, expected": {"cost": alternating},
        "greedy by saving": {"cost": greedy(costs, sizes, budget)},
    }
    for name, options in {
        "relaxation rounded": {"gap": arguments.gap},
        "the rest by the solver, gap 1e-6": {"gap": 1e-6},
        "whole program to CBC": {"gap": arguments.gap, "solver": "cbc"},
    }.items():
        seconds = []
        for _ in range(arguments.repeats):
            found = allocate(costs, sizes, budget, **options)
            assert found.num_bytes <= budget
            seconds.append(found.seconds)
        rows[name] = {"cost": found.cost, "gap": found.gap, "seconds": statistics.median(seconds)}
        rows[name]["range_s"] = [min(seconds), max(seconds)]
    searched = max(dual_bound(costs, sizes, budget, price) for price in np.geomspace(1e-14, 1e-4, 4000))
    assert searched <= found.bound * (1 + 1e-9) <= min(row["cost"] for row in rows.values()) * (1 + 1e-9)

    print(f"{count:,} experts x {len(WIDTHS)} widths, {arguments.bits} bits on average: {budget:,} bytes")
    print(f"lower bound {found.bound:.6g}; by a search over prices {searched:.6g}\n")
    print("| choice | cost | above the bound | seconds (range) |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        row["gap"] = relative_gap(row["cost"], found.bound)
        timed = f"{row['seconds']:.2f} ({row['range_s'][0]:.2f} to {row['range_s'][1]:.2f})" if "seconds" in row else ""
        print(f"| {name} | {row['cost']:.6g} | {100 * row['gap']:.5f} % | {timed} |")
    print(json.dumps({"experts": count, "widths": len(WIDTHS), "bound": found.bound, "choices": rows}))


if __name__ == "__main__":
    main()
