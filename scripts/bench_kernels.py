"""Measure the CPU kernels: GEMV in GB/s, a model's experts as a whole, GEMM in GFLOP/s, for each weight format.

Every kernel is checked against float64 arithmetic on dequantised weights before it is timed; a wrong result ends the
run with exit code 1. All that is compared takes turns in the same rounds; a ratio is the median over rounds, with its
range. Weights come from memory: working sets are several times the last-level cache. Baselines: torch's bf16 linear and
its int4 and int8 kernels, transformers' experts. llama.cpp has no interface to its kernels: compare whole models with
bench_decode.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path

FORMATS = (
    "float32", "bfloat16", "int8", "int8-g64", "int4-g32", "int4-g64", "int4-g128", "int3-g64", "int2-g64", "int1-g64",
    "mxfp4", "fp8", "bf16-lossless", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q4_0",
    "iq4_xs", "ggml_mxfp4",
)  # fmt: skip
PARTS = ("gemv", "block", "gemm")
FIGURES = (  # to reach: name, key of a result, at least
    ("one token, int4: x torch's int4", "gemv int4 ratio", 2.0),
    ("one token, int4: share of the read bandwidth", "gemv int4 share", 0.55),
    ("one token, int8: share of the read bandwidth", "gemv int8 share", 0.75),
    ("one token, bf16: share of the read bandwidth", "gemv bfloat16 share", 0.75),
    ("experts, bf16, 1 token: x transformers eager", "block 1 eager", 4.0),
    ("experts, bf16, 16 tokens: x transformers eager", "block 16 eager", 3.0),
    ("experts, bf16, 512 tokens: x transformers' best", "block 512 best", 1.0),
)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="of GEMV and GEMM, with commas")
    parser.add_argument("--shape", default="4096x2048", help="of a matrix, out x in features (4096x2048)")
    parser.add_argument("--tokens", default="1,16,512", help="of the experts' walks (1,16,512); GEMM takes the most")
    parser.add_argument("--layers", type=int, default=30, help="of experts to walk through (30)")
    parser.add_argument("--model", help="checkpoint folder of a Mixtral in bf16; without it random weights of its size")
    parser.add_argument("--working-set-mb", type=int, help="of GEMV; without it 4 times the last-level cache")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (7)")
    parser.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, of gemv,block,gemm")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.shape, arguments.working_set_mb, arguments.rounds, arguments.tokens = "256x256", 1, 2, "1,3,32"

    import torch

    from bench.machine import print_card
    from bench.matrices import WrongResult
    from moeflow.kernels.cpu.library import instruction_set

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if instruction_set() is None:
        print("moeflow's compiled kernels are not here: install moeflow where there is a C++ compiler", file=sys.stderr)
        return 1
    say("measuring the machine's ceilings")
    result = {"card": kernel_card(arguments.quick)}
    print_card(card_lines(result["card"]))
    code = 0
    try:
        with torch.inference_mode():
            for part, measure in zip(PARTS, (measure_gemv, measure_block, measure_gemm), strict=True):
                if part in arguments.only.split(","):
                    result[part] = measure(arguments)
        result["figures"] = None if arguments.quick else print_figures(result)
    except WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        result["wrong"], code = str(error), 1
    print(json.dumps(result))
    return code


def kernel_card(is_quick: bool) -> dict:
    """Return the card: the machine, its ceilings, versions."""
    import torch

    from bench.ceilings import last_level_cache_bytes, peak, read_bandwidth
    from bench.machine import describe
    from moeflow.kernels.cpu.library import instruction_set

    return {
        **describe("moeflow", "torch", "transformers"),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "instruction_set": instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "read_bytes_per_s": read_bandwidth(is_quick),
        "peak_flop_per_s": peak(256 if is_quick else 2048),
        "not_installed": [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None],
    }


def card_lines(card: dict) -> dict[str, str]:
    """Return the lines of a card, by name."""
    from bench.machine import software

    read, peak = card["read_bytes_per_s"] / 1e9, card["peak_flop_per_s"] / 1e9
    return {
        "machine": f"{card['cpu']}, {card['cores']} cores, {card['threads']} threads used, load {card['load']:.1f}",
        "cache": f"{card['last_level_cache_bytes'] >> 20} MiB",
        "kernels": f"{card['instruction_set']}; torch's {card['torch_capability']}",
        "ceiling": f"{read:.1f} GB/s read; {peak:.0f} GFLOP/s float32",
        "software": software(card),
        "also": f"not installed: {', '.join(card['not_installed']) or '-'}; llama.cpp: see bench_decode",
    }


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def measure_gemv(arguments) -> list[dict]:
    """Measure one token by a matrix, for each format; print the table."""
    import torch

    from bench.ceilings import last_level_cache_bytes
    from bench.matrices import ACTIVATION_BITS, Copies, torch_linear
    from bench.rounds import Case, quotients, ranged, spread, take_turns
    from moeflow.kernels.cpu import ops as cpu

    shape = tuple(int(n) for n in arguments.shape.split("x"))
    working_set = arguments.working_set_mb << 20 if arguments.working_set_mb else 4 * last_level_cache_bytes()
    block = torch.ones(working_set // 8, dtype=torch.int64)
    shared = [
        Case("read", lambda: cpu.read(block), block.nbytes),
        torch_linear(shape, working_set, 1, torch.bfloat16),
    ]
    print(
        f"GEMV: 1 token, [{shape[0]}, {shape[1]}], bf16 activations, at least {working_set >> 20} MB of weights in turn"
    )
    print(
        f"{'format':11} {'activations':14} {'us a matrix':>24} {'GB/s':>6} {'% read':>7} {'x torch bf16':>22} "
        f"{'x torch same bits':>22}"
    )
    rows = []
    for name in arguments.formats.split(","):
        say(f"GEMV {name}")
        copies = Copies(name, shape, working_set)
        errors = copies.check(1)
        ours = [copies.case("exact", 1)]
        if copies.has_codes:
            ours.append(copies.case(f"int{ACTIVATION_BITS}", 1, ACTIVATION_BITS))
        theirs = copies.torch_cases()
        times = take_turns([*shared, *ours, *theirs], arguments.rounds)
        a_matrix = {case.name: [t / case.count for t in times[case.name]] for case in (*shared[1:], *ours, *theirs)}
        read = [block.nbytes / t for t in times["read"]]
        same_bits = [min(both) for both in zip(*(a_matrix[case.name] for case in theirs), strict=True)]
        for case in (*theirs, *ours):
            rate = [case.num_bytes / t for t in times[case.name]]
            row = {
                "format": name,
                "activations": case.name,
                "matrix_s": spread(a_matrix[case.name]),
                "bytes_per_s": statistics.median(rate),
                "share_of_read": quotients(rate, read),
                "ratio_to_torch_bf16": quotients(a_matrix["torch bfloat16"], a_matrix[case.name]),
                "ratio_to_torch_same_bits": quotients(same_bits, a_matrix[case.name]) if same_bits else None,
                "errors": errors if case in ours else None,
                "read_bytes_per_s": statistics.median(read),
            }
            rows.append(row)
            kind, remark = (case.name, "") if case in ours else (case.name.split()[-1], f"  {case.name}")
            to_bf16, to_same = (ranged(row[f"ratio_to_torch_{kind}"], 1, 6, 2) for kind in ("bf16", "same_bits"))
            print(
                f"{name:11} {kind:14} {ranged(row['matrix_s'], 1e6, 8, 1):>24} "
                f"{row['bytes_per_s'] / 1e9:6.1f} {100 * row['share_of_read']['median']:6.0f}% "
                f"{to_bf16:>22} {to_same:>22}{remark}"
            )
    print()
    return rows


def measure_block(arguments) -> list[dict]:
    """Measure the experts of all layers, transformers' against ours; print the table."""
    from bench.blocks import Block, Routes, Size, implementations, transformers_case
    from bench.matrices import random_matrix
    from bench.rounds import quotients, ranged, spread, take_turns
    from moeflow.kernels.quantization.formats import find_format

    size = (
        Size(num_layers=2, num_experts=4, num_features=64, intermediate=96)
        if arguments.quick
        else Size(arguments.layers)
    )
    say("making the experts")
    random = [
        {
            key: random_matrix(find_format("float32"), shape, 2 * expert + number)["weight"]
            for number, (key, shape) in enumerate(size.shapes.items())
        }
        for expert in range(size.num_experts)
    ]
    bf16 = Block("bfloat16", size, random)
    if arguments.model and not arguments.quick:
        bf16.read_model(Path(arguments.model))
    modules = bf16.modules()
    print(
        f"Experts: {size.num_layers} layers of {size.num_experts}, [{2 * size.intermediate}, {size.num_features}] and "
        f"[{size.num_features}, {size.intermediate}], top-{size.top_k}, all layers in turn, random routes"
    )
    print(f"{'tokens':>6} {'':24} {'ms a layer':>24} {'GB/s':>6} {'x eager':>22} {'x best of transformers':>24}")
    rows, weights = [], bf16.weights()
    for form in ("bfloat16", "int8", "int4-g64"):
        block = bf16 if form == "bfloat16" else Block(form, size, weights)
        for num_tokens in (int(n) for n in arguments.tokens.split(",")):
            say(f"experts {form}, {num_tokens} tokens")
            routes = Routes(size, num_tokens, 4 if num_tokens == 1 else 1)
            errors = block.check(num_tokens)
            names = implementations(bf16, num_tokens)
            for name in names:
                modules[0].config._experts_implementation = name
                bf16.check_module(modules[0], num_tokens)
            theirs = [transformers_case(bf16, modules, name, num_tokens, routes) for name in names]
            ours = [block.case(f"moeflow {form}", num_tokens, routes)]
            times = take_turns([*theirs, *ours], arguments.rounds)
            best = min(names, key=lambda name: statistics.median(times[name]))
            for case in (*(theirs if block is bf16 else []), *ours):
                row = {
                    "format": form,
                    "tokens": num_tokens,
                    "engine": case.name,
                    "layer_s": spread([t / case.count / size.num_layers for t in times[case.name]]),
                    "bytes_per_s": case.num_bytes / statistics.median(times[case.name]),
                    "ratio_to_eager": quotients(times["eager"], times[case.name]),
                    "best": best,
                    "ratio_to_best": quotients(times[best], times[case.name]),
                    "error": errors if case in ours else None,
                }
                rows.append(row)
                engine = case.name if case in ours else f"transformers {case.name}"
                print(
                    f"{num_tokens:6} {engine:24} {ranged(row['layer_s'], 1e3, 8, 3):>24} "
                    f"{row['bytes_per_s'] / 1e9:6.1f} {ranged(row['ratio_to_eager'], 1, 6, 2):>22} "
                    f"{ranged(row['ratio_to_best'], 1, 6, 2):>24} {best if case in ours else ''}"
                )
    print()
    return rows


def measure_gemm(arguments) -> list[dict]:
    """Measure many tokens by a matrix, for each format; print the table."""
    import torch

    from bench.ceilings import peak
    from bench.matrices import Copies, torch_linear
    from bench.rounds import quotients, ranged, spread, take_turns

    shape = tuple(int(n) for n in arguments.shape.split("x"))
    num_tokens = max(int(n) for n in arguments.tokens.split(","))
    say(f"GEMM of {num_tokens} tokens")
    base = torch_linear(shape, 1, num_tokens, torch.float32)
    cases, errors = [base, torch_linear(shape, 1, num_tokens, torch.bfloat16)], {}
    for name in arguments.formats.split(","):
        copies = Copies(name, shape, 1)
        errors[name] = copies.check(num_tokens)
        cases.append(copies.case(name, num_tokens))
    times = take_turns(cases, arguments.rounds)
    operations = 2 * num_tokens * shape[0] * shape[1]
    highest = peak(256 if arguments.quick else 2048)
    print(
        f"GEMM: {num_tokens} tokens, [{shape[0]}, {shape[1]}]; torch float32 has float32 activations, all others bf16; "
        f"peak {highest / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':14} {'ms':>24} {'GFLOP/s':>8} {'% peak':>7} {'x torch bf16':>22} {'x torch float32':>22}")
    rows = []
    for case in cases:
        found = times[case.name]
        row = {
            "format": case.name,
            "seconds": spread(found),
            "flop_per_s": operations / statistics.median(found),
            "share_of_peak": operations / statistics.median(found) / highest,
            "ratio_to_torch_bf16": quotients(times["torch bfloat16"], found),
            "ratio_to_torch_float32": quotients(times[base.name], found),
            "errors": errors.get(case.name),
        }
        rows.append(row)
        print(
            f"{case.name:14} {ranged(row['seconds'], 1e3, 8, 2):>24} {row['flop_per_s'] / 1e9:8.1f} "
            f"{100 * row['share_of_peak']:6.0f}% {ranged(row['ratio_to_torch_bf16'], 1, 6, 2):>22} "
            f"{ranged(row['ratio_to_torch_float32'], 1, 6, 2):>22}"
        )
    print()
    return rows


def print_figures(result: dict) -> dict[str, float | None]:
    """Print the figures to reach beside the measured ones; return the measured."""
    found: dict[str, float | None] = {}
    for row in result.get("gemv", []):
        form = {"int4-g64": "int4"}.get(row["format"], row["format"])
        if row["activations"].startswith("torch"):
            continue
        for key, ratio in (("share", row["share_of_read"]), ("ratio", row["ratio_to_torch_same_bits"])):
            if ratio:
                name = f"gemv {form} {key}"
                found[name] = max(found.get(name) or 0.0, ratio["median"])
    for row in result.get("block", []):
        if row["engine"] == "moeflow bfloat16":
            found[f"block {row['tokens']} eager"] = row["ratio_to_eager"]["median"]
            found[f"block {row['tokens']} best"] = row["ratio_to_best"]["median"]
    for what, key, least in FIGURES:
        if key in found:
            print(f"{what}: {found[key]:.2f}, wanted {least:.2f}{'' if found[key] >= least else ', NOT reached'}")
    return {key: found.get(key) for _, key, _ in FIGURES}


if __name__ == "__main__":
    raise SystemExit(main())
