"""Measure the lossless format: bytes of all experts of a model, speed of encoder, check and kernels, and decoding.

Every matrix is encoded, decoded and compared with its source; a bit that differs ends the run with exit code 1. Kernels
and models take turns in the same rounds; a ratio is the median over rounds, with its range.
"""

import argparse
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from bench.lossless_capped import measure_capped
from bench.lossless_decode import WrongBits, measure_budget, measure_resident, say

PARTS = ("bytes", "gemv", "resident", "budget", "capped")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder of bfloat16 experts; without it the demo model")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--threads", default="1,2", help="of the kernels, in turn (1,2); decoding takes the most")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (7)")
    parser.add_argument("--tokens", type=int, default=48, help="decoded in a measurement (48)")
    parser.add_argument("--budget", type=float, default=0.25, help="of the bytes of all experts in bfloat16 (0.25)")
    parser.add_argument("--cap", default="1000MB", metavar="SIZE", help="of each whole process, of capped (1000MB)")
    parser.add_argument("--shape", default="4096x2048", help="of GEMV's other matrices, out x in features (4096x2048)")
    parser.add_argument("--work", help="folder on a real disk for two packed files; without it the system's own")
    parser.add_argument("--working-set-mb", type=int, help="of GEMV; without it 8 times the last-level cache")
    arguments = parser.parse_args(argv)

    import torch

    from bench.machine import describe, print_card
    from moeflow.demo.model import default_demo_path
    from moeflow.kernels.cpu.library import instruction_set

    folder = Path(arguments.model) if arguments.model else default_demo_path()
    threads = [int(number) for number in arguments.threads.split(",")]
    about = describe("moeflow", "torch", "transformers")
    machine = f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}"
    print_card({"machine": machine, "kernels": str(instruction_set()), "model": folder.name})
    result: dict = {"card": about, "model": folder.name, "instruction_set": instruction_set()}
    measures = {
        "bytes": lambda: measure_bytes(folder),
        "gemv": lambda: measure_gemv(folder, threads, arguments),
        "resident": lambda: measure_resident(folder, arguments),
        "budget": lambda: measure_budget(folder, Path(work), arguments),
        "capped": lambda: measure_capped(folder, Path(work), arguments),
    }
    wanted = arguments.only.split(",")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a capped process and removes its cgroup
    with tempfile.TemporaryDirectory(dir=arguments.work) as work, torch.inference_mode():
        for part, measure in measures.items():
            if part not in wanted:
                continue
            torch.set_num_threads(1 if part == "bytes" else max(threads))
            say(part)
            try:
                result[part] = measure()
            except WrongBits as error:
                print(f"wrong bits: {error}", file=sys.stderr)
                return 1
            print(flush=True)
    print(json.dumps(result))
    return 0


def parts_for(weight):
    """Return room for a matrix in the lossless format, just enough: its format, codes, tops and escapes."""
    import torch

    from moeflow.kernels.cpu.lossless import count_escapes
    from moeflow.kernels.quantization.formats import lossless_format

    spec = lossless_format(count_escapes(weight))
    dtypes = {"U8": torch.uint8, "U16": torch.uint16}
    return spec, [torch.empty(shape, dtype=dtypes[dtype]) for _, dtype, shape in spec.tensors("", weight.shape)]


def measure_bytes(folder: Path) -> dict:
    """Encode, check, decode and compare every matrix; print bytes and speeds of one thread."""
    import torch

    from bench.expert_matrices import expert_matrices
    from moeflow.kernels.cpu.lossless import decode, encode

    total = dict.fromkeys(("matrices", "values", "escapes", "rows", "rows_with", "floats", "stored", "differing"), 0)
    seconds = dict.fromkeys(("encode", "check", "decode"), 0.0)
    experts = set()
    for layer, expert, name, weight in expert_matrices(folder):
        spec, parts = parts_for(weight)
        out, shape = torch.empty_like(weight), tuple(weight.shape)
        clock = [time.perf_counter()]
        encode(weight, *parts)
        clock.append(time.perf_counter())
        decode(*parts, shape, None)
        clock.append(time.perf_counter())
        decode(*parts, shape, out)
        clock.append(time.perf_counter())
        for what, (before, after) in zip(seconds, pairwise(clock), strict=True):
            seconds[what] += after - before
        differing = int((out.view(torch.int16) != weight.view(torch.int16)).sum())
        if differing:
            raise WrongBits(f"{differing} values of {name} of expert {expert} of layer {layer}")
        experts.add((layer, expert))
        for what, more in (
            ("matrices", 1),
            ("values", weight.numel()),
            ("escapes", spec.num_escapes),
            ("rows", shape[0]),
            ("rows_with", int((parts[1].numpy() >> 8 & 1).sum())),
            ("floats", weight.nbytes),
            ("stored", spec.num_bytes(shape)),
        ):
            total[what] += more
    speeds = {what: total["floats"] / taken for what, taken in seconds.items()}
    share = total["stored"] / total["floats"]
    print(f"{len(experts)} experts, {total['matrices']} matrices, {total['differing']} values differ after decoding")
    print(f"bytes: {share:.4f} of bfloat16, {16 * share:.3f} bits a weight")
    escapes, rows = total["escapes"] / total["values"], total["rows_with"] / total["rows"]
    print(f"escapes: {escapes:.4%} of values, in {rows:.2%} of rows")
    print("one thread, GB/s of bfloat16: " + ", ".join(f"{what} {speed / 1e9:.2f}" for what, speed in speeds.items()))
    return {**total, "experts": len(experts), "share": share, "bytes_per_s": speeds}


def measure_gemv(folder: Path, threads: list[int], arguments) -> list[dict]:
    """Multiply one token with the model's matrices, and with random ones of one shape; print the tables."""
    import torch

    from bench.expert_matrices import expert_matrices

    num_rows, in_features = (int(number) for number in arguments.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    random = (torch.randn(num_rows, in_features, generator=generator) / in_features**0.5).bfloat16()
    return [
        *multiply("the model's matrices", (found.weight for found in expert_matrices(folder)), threads, arguments),
        *multiply(f"matrices of normal numbers {list(random.shape)}", itertools.repeat(random), threads, arguments),
    ]


def multiply(what: str, weights: Iterator, threads: list[int], arguments) -> list[dict]:
    """Multiply one token with more matrices than a cache holds, in both formats; print the table."""
    import torch

    from bench.ceilings import last_level_cache_bytes
    from bench.rounds import Case, quotients, ranged, take_turns
    from moeflow.kernels.cpu import ops as cpu
    from moeflow.kernels.cpu.lossless import encode
    from moeflow.kernels.quantization.formats import FORMATS

    working_set = arguments.working_set_mb << 20 if arguments.working_set_mb else 8 * last_level_cache_bytes()
    kernels, num_bytes, shapes = {"bfloat16": [], "lossless": []}, {"bfloat16": 0, "lossless": 0}, []
    for weight in weights:
        shape, (spec, parts) = tuple(weight.shape), parts_for(weight)
        encode(weight, *parts)
        stored = dict(zip(("weight", "weight_top", "weight_escapes"), parts, strict=True))
        for name, tensors, form in (
            ("bfloat16", {"weight": weight.clone()}, FORMATS["bfloat16"]),
            ("lossless", stored, spec),
        ):
            kernels[name].append(cpu.LinearKernel(tensors, "weight", form, shape))
            num_bytes[name] += form.num_bytes(shape)
        shapes.append(shape)
        if num_bytes["bfloat16"] >= working_set:
            break
    generator = torch.Generator().manual_seed(0)
    inputs = {k: torch.randn(1, k, generator=generator).bfloat16() for _, k in shapes}
    outputs = {n: torch.empty(1, n, dtype=torch.bfloat16) for n, _ in shapes}
    for number, (n, k) in enumerate(shapes):
        found = []
        for name in kernels:
            kernels[name][number](inputs[k], outputs[n])
            found.append(outputs[n].view(torch.int16).clone())
        if not torch.equal(*found):
            raise WrongBits(f"the product of matrix {number} {[n, k]}")
    block = torch.ones(working_set // 8, dtype=torch.int64)

    def walk(name):
        for kernel, (n, k) in zip(kernels[name], shapes, strict=True):
            kernel(inputs[k], outputs[n])

    cases = [
        Case("read", lambda: cpu.read(block), block.nbytes),
        *(Case(name, lambda name=name: walk(name), num_bytes[name], len(shapes)) for name in kernels),
    ]
    size = f"{len(shapes)} of {what}, {num_bytes['bfloat16'] >> 20} MiB in bfloat16"
    print(f"GEMV: 1 token, {size}; same bits")
    print(f"{'threads':>7} {'format':9} {'us a matrix':>24} {'GB/s':>6} {'% read':>22} {'x bfloat16':>22}")
    rows = []
    for number in threads:
        torch.set_num_threads(number)
        times = take_turns(cases, arguments.rounds)
        read = [block.nbytes / t for t in times["read"]]
        for case in cases[1:]:
            rates = [case.num_bytes / t for t in times[case.name]]
            share, ratio = quotients(rates, read), quotients(times["bfloat16"], times[case.name])
            a_matrix = quotients(times[case.name], [case.count] * arguments.rounds)
            row = {
                "matrices": what,
                "threads": number,
                "format": case.name,
                "matrix_s": a_matrix,
                "bytes_per_s": statistics.median(rates),
            }
            rows.append({**row, "share_of_read": share, "ratio_to_bfloat16": ratio, "read": statistics.median(read)})
            print(
                f"{number:7} {case.name:9} {ranged(a_matrix, 1e6, 8, 1):>24} {statistics.median(rates) / 1e9:6.1f} "
                f"{ranged(share, 100, 6, 0):>22} {ranged(ratio, 1, 6, 2):>22}"
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
