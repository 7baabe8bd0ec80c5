"""Measure the Triton kernels of routed experts on a GPU: decode in GB/s, prefill in GFLOP/s, for each weight format.

Every row is checked against float32 arithmetic on dequantised weights before it is timed. Baselines: torch's bf16
linears in a loop over experts, and torch's grouped matrix product (what transformers' grouped_mm calls) where it has
one. `--check` runs tiny shapes, without timing, wherever the kernels run: without a GPU under TRITON_INTERPRET=1.
"""

import argparse
import functools
import json
import statistics
import sys

import torch
import torch.nn.functional as F

from bench.matrices import fill_blocks
from moeflow.core import PAGE_BYTES, MatrixSpec, RecordLayout, align_up
from moeflow.kernels.activations import Activation
from moeflow.kernels.expert_mlp import combine
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.triton.experts import TritonExperts, available

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "U16": torch.uint16}
DEFAULT_FORMATS = [
    "bfloat16",
    "bf16-lossless-4096",
    "int8",
    "int4-g64",
    "int3-g64",
    "int2-g64",
    "int1-g64",
    "mxfp4",
    "fp8",
    "q8_0",
    "q6_k",
    "q5_k",
    "q4_k",
    "q4_0",
    "ggml_mxfp4",
]
SILU = Activation("silu", "concatenated")


class Layer:
    """Random experts of one format in an arena on the device, and the bf16 matrices they stand for.

    Args:
        name: of the format.
        args: hidden, intermediate and experts of the command line.
    """

    def __init__(self, name: str, args: argparse.Namespace, device: str):
        self.spec = find_format(name)
        shapes = {
            "gate_up_proj": (2 * args.intermediate, args.hidden),
            "down_proj": (args.hidden, args.intermediate),
        }
        tensors = [tensor for matrix, shape in shapes.items() for tensor in self.spec.tensors(matrix, shape)]
        is_float = self.spec.kind == "float"
        matrices = () if is_float else tuple(MatrixSpec(key, name, shape) for key, shape in shapes.items())
        self.record = RecordLayout.pack(tensors, matrices)
        stride = align_up(self.record.num_bytes, PAGE_BYTES)
        self.arena = torch.randint(0, 256, (args.experts, stride), dtype=torch.uint8, device=device)
        if self.spec.kind == "lossless":
            for key, shape in shapes.items():
                self._encode(key, shape)
        else:
            for tensor in self.record.tensors:
                self._fill(tensor)
        self.every = torch.arange(args.experts, dtype=torch.int32, device=device) * (stride // 64)  # locations
        self.kernels = TritonExperts.build(self.record, SILU)
        assert self.kernels is not None, f"no Triton kernel for {name}"
        self.weights = {
            key: torch.stack([dequantize(self._views(slot), key, self.spec, shape).bfloat16() for slot in self.arena])
            for key, shape in shapes.items()
        }

    def _fill(self, tensor):
        largest = {"int": 128, "fp8": 448}.get(self.spec.kind, 2 ** (self.spec.bits - 1))
        for slot in self.arena:
            view = self._views(slot)[tensor.name]
            if self.spec.kind == "ggml":
                fill_blocks(view, self.spec)
            elif tensor.dtype != "U8":
                view.normal_(0, 0.05 / (1 if self.spec.kind == "float" else largest))
                if tensor.name.endswith("_zero"):
                    view.fill_(largest - 0.5)
            elif tensor.name.endswith("_scale"):
                view.random_(118, 122)
            elif self.spec.kind == "fp8":
                view[view & 0x7F == 0x7F] = 0

    def _encode(self, key, shape):
        for slot in self.arena:
            views = self._views(slot)
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.05)
            for part, stored in zip(
                ("", "_top", "_escapes"), encode_lossless(weight, self.spec.num_escapes), strict=True
            ):
                views[key + part].copy_(stored)

    def _views(self, slot):
        return {
            spec.name: slot[spec.offset : spec.offset + spec.num_bytes].view(DTYPES[spec.dtype]).view(spec.shape)
            for spec in self.record.tensors
        }

    def torch_loop(self, hidden_states, slots, top_k_weights):
        """Run torch's bf16 linears, one expert after another; the synchronisation to know them is part of it."""
        flat, top_k = slots.reshape(-1).long(), slots.shape[1]
        order = flat.argsort(stable=True)
        outputs = hidden_states.new_empty(len(flat), hidden_states.shape[1])
        begin = 0
        for expert, count in enumerate(torch.bincount(flat, minlength=len(self.arena)).tolist()):
            if count:
                places = order[begin : begin + count]
                gate, up = F.linear(hidden_states[places // top_k], self.weights["gate_up_proj"][expert]).chunk(2, -1)
                outputs[places] = F.linear(F.silu(gate) * up, self.weights["down_proj"][expert])
            begin += count
        return combine(outputs.view(*slots.shape, -1), top_k_weights)

    def torch_grouped(self, hidden_states, slots, top_k_weights):
        """Run torch's grouped matrix product on bf16 weights."""
        order, ends = _sorted(slots, len(self.arena))
        product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
        tokens = hidden_states[order // slots.shape[1]]
        gate, up = product(tokens, self.weights["gate_up_proj"].transpose(1, 2), offs=ends).chunk(2, -1)
        products = product(F.silu(gate) * up, self.weights["down_proj"].transpose(1, 2), offs=ends)
        outputs = torch.empty_like(products)
        outputs[order] = products
        return combine(outputs.view(*slots.shape, -1), top_k_weights)

    @functools.cache  # no part of what is timed  # noqa: B019
    def _locations(self, slots):
        return self.every[slots.long()]

    def decode(self, hidden_states, slots, top_k_weights):
        """Run the fused decode kernels."""
        return self.kernels.decode(hidden_states, self.arena, self._locations(slots), top_k_weights)

    def prefill(self, hidden_states, slots, top_k_weights):
        """Run the grouped prefill kernels, sorting included."""
        order, ends = _sorted(slots, len(self.arena))
        offsets = F.pad(ends, (1, 0))
        outputs = torch.zeros(slots.numel(), hidden_states.shape[1], device=hidden_states.device)
        tokens = (order // slots.shape[1]).int()
        self.kernels.prefill(hidden_states, self.arena, self.every, tokens, offsets, order.int(), outputs)
        return self.kernels.combine(outputs, top_k_weights, hidden_states.dtype)

    def expected(self, hidden_states, slots, top_k_weights):
        """Compute in float32 from the dequantised values."""
        result = torch.zeros(hidden_states.shape, device=hidden_states.device)
        for expert, slot in enumerate(self.arena):
            here = (slots == expert).float() * top_k_weights.float()
            chosen = here.sum(1).nonzero()[:, 0]
            if len(chosen):
                views, shapes = self._views(slot), {key: tuple(w.shape[1:]) for key, w in self.weights.items()}
                values = {key: dequantize(views, key, self.spec, shape) for key, shape in shapes.items()}
                gate, up = (hidden_states[chosen].float() @ values["gate_up_proj"].T).chunk(2, -1)
                result[chosen] += here.sum(1)[chosen, None] * ((F.silu(gate) * up) @ values["down_proj"].T)
        return result


def _sorted(slots, num_experts):
    """Return (order [T * K] by expert, ends int32 [num_experts]) without a look from the host."""
    flat = slots.reshape(-1).long()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=slots.device).index_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int32)
    )
    return flat.argsort(stable=True), counts.cumsum(0).int()


def draw(layer, num_tokens, args, seed):
    """Draw tokens [T, H], distinct slots [T, K] and router weights [T, K]."""
    device = layer.arena.device
    generator = torch.Generator(device).manual_seed(seed)
    hidden_states = torch.randn(num_tokens, args.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(num_tokens, args.experts, device=device, generator=generator)
    top_k_weights, slots = scores.topk(args.top_k)
    return hidden_states, slots.int(), top_k_weights.bfloat16()


def median_s(run, draws, repeats):
    """Return the median seconds of a call; the draws take turns, so that weights do not stay in the caches."""
    for inputs in draws:
        run(*inputs)
    times = []
    for turn in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run(*draws[turn % len(draws)])
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_bytes_per_s(repeats=10):
    """Measure the bandwidth of a large read of the GPU's memory."""
    large = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    seconds = median_s(lambda: large.sum(), [()], repeats)
    return large.numel() * 4 / seconds


def check(layer, name, run, inputs):
    """Stop where a kernel is wrong."""
    expected = layer.expected(*inputs)
    error = ((run(*inputs).float() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"{name}: relative error {error:.2e}, allowed 1e-2"
    return error


def main(argv=None) -> int:
    """Run the benchmark. Returns the exit code: 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=DEFAULT_FORMATS)
    parser.add_argument("--hidden", type=int, default=2048, help="H (default: of Qwen3-30B-A3B)")
    parser.add_argument("--intermediate", type=int, default=768, help="I")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--decode-tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prefill-tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--check", action="store_true", help="tiny shapes, no timing; also under TRITON_INTERPRET=1")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or (args.check and available())):
        print(
            "no GPU here, so nothing can be measured. On a machine without one the kernels can be checked: "
            "pip install triton, then TRITON_INTERPRET=1 python scripts/bench_triton.py --check",
            file=sys.stderr,
        )
        return 2
    if args.check:
        args.hidden, args.intermediate, args.experts, args.top_k = 64, 32, 4, 2
        if any(find_format(name).group_size > 128 for name in args.formats):  # rows are whole blocks
            args.hidden, args.intermediate = 256, 256
        args.decode_tokens, args.prefill_tokens = [1], [5]
    rows = bench(args)
    print(json.dumps({"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter", **rows}))
    return 0


def bench(args):
    """Check and time every format; print a table. Returns the rows and the bandwidth."""
    timed = not args.check
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = read_bytes_per_s() if timed else None
    if timed:
        print(f"{torch.cuda.get_device_name()}: reads {limit / 1e9:.0f} GB/s")
    print(f"H {args.hidden}, I {args.intermediate}, {args.experts} experts, top-{args.top_k}")
    found = []
    for name in args.formats:
        layer = Layer(name, args, device)
        runs = [("decode", num_tokens) for num_tokens in args.decode_tokens]
        runs += [("prefill", num_tokens) for num_tokens in args.prefill_tokens]
        for phase, num_tokens in runs:
            draws = [draw(layer, num_tokens, args, seed) for seed in range(4)]
            kernel = layer.decode if phase == "decode" else layer.prefill
            row = {"format": name, "phase": phase, "tokens": num_tokens}
            row["error"] = check(layer, f"{name} {phase}", kernel, draws[0])
            if timed:
                row |= timings(layer, kernel, draws, args, limit)
            found.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        del layer
    return {"read_bytes_per_s": limit, "rows": found}


def timings(layer, kernel, draws, args, limit):
    """Time a kernel and its baselines; rates are of the experts' bytes touched once and of the products needed."""
    seconds = median_s(kernel, draws, args.repeats)
    touched = statistics.mean(slots.unique().numel() for _, slots, _ in draws) * layer.record.num_bytes
    flops = draws[0][1].numel() * 6 * args.hidden * args.intermediate
    row = {
        "us": seconds * 1e6,
        "gb_per_s": touched / seconds / 1e9,
        "percent_of_read": 100 * touched / seconds / limit,
        "gflop_per_s": flops / seconds / 1e9,
        "torch_loop_us": median_s(layer.torch_loop, draws, args.repeats) * 1e6,
    }
    try:
        row["torch_grouped_us"] = median_s(layer.torch_grouped, draws, args.repeats) * 1e6
    except (RuntimeError, AttributeError) as error:
        print(f"torch's grouped product does not run here: {str(error).splitlines()[0]}")
    return row


if __name__ == "__main__":
    sys.exit(main())
