"""Compile the Triton kernels for cards that are not here, and say what each needs: registers, local and shared memory.

What the interpreter takes, a GPU's compiler may refuse. Run in a process without the interpreter; prints one line a
kernel and fails where one breaks a limit:

    python tests/helpers/triton_compile.py [--one-of 12] [--arch 86 89 90 120] [--formats int4-g64 ...]

`check` and `count_kernels` are for scripts. All kernels take an hour; --one-of N takes each model for one of the cards
and of its kernels every N-th, at random.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from helpers.triton_card import SHARED_BYTES, Card, Compiled, Kernel
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.activations import ACTIVATIONS, Activation
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.triton.experts import TritonExperts, find_plan
from moeflow.kernels.triton.matrix import BLOCK_FORMATS

MAX_KERNELS = 12  # that a model compiles for one record layout and dtype
MAX_LOCAL_BYTES = 128  # of a thread: 32 registers that did not fit
# Every kind and width of packed values; groups and their like are covered by the first of each.
FORMATS = (
    "bfloat16", "float16", "float32", "bf16-lossless-4096", "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128",
    "int3-g64", "int2-g64", "int1-g64", "mxfp4", "fp8", *BLOCK_FORMATS,
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)
SILU = Activation("silu", "concatenated")
GATES = [(kind, gate) for kind in ACTIVATIONS for gate in ("none", "concatenated", "interleaved")]
WIDTH, INNER, TOP_K = 2048, 768, 8  # of Qwen3-30B-A3B


class Model(NamedTuple):
    """One record layout and activation: what decides the kernels of a model."""

    format: str
    activation: Activation = SILU
    has_bias: bool = False
    is_transposed: bool = False

    @property
    def name(self) -> str:
        extras = f"{' bias' * self.has_bias}{' [in, out]' * self.is_transposed}"
        return f"{self.format} {self.activation.kind} {self.activation.gate}{extras}"

    def experts(self) -> TritonExperts:
        first = "up_proj" if self.activation.gate == "none" else "gate_up_proj"
        shapes = {first: (INNER * (1 if first == "up_proj" else 2), WIDTH), "down_proj": (WIDTH, INNER)}
        spec, tensors, matrices = find_format(self.format), [], []
        for name, shape in shapes.items():
            tensors += spec.tensors(name, shape[::-1] if self.is_transposed else shape)
            matrices += [] if spec.kind == "float" else [MatrixSpec(name, spec.name, shape)]
            tensors += [(f"{name}_bias", "BF16", shape[:1])] if self.has_bias else []
        plan = find_plan(RecordLayout.pack(tensors, tuple(matrices)), self.activation, is_transposed=self.is_transposed)
        assert plan is not None, f"no kernels for {self.name}"
        return TritonExperts(plan)


def all_models() -> list[Model]:
    """Every format with the most usual activation, every activation with one format, biases, matrices [in, out]."""
    limited = [Activation(kind, gate, 1.702, 7.0) for kind, gate in GATES if (kind, gate) != ("silu", "concatenated")]
    return [
        *map(Model, FORMATS),
        *(Model("int4-g64", activation) for activation in limited),
        Model("mxfp4", Activation("swiglu_oai", "interleaved", 1.702, 7.0), has_bias=True),
        *(Model(name, is_transposed=True) for name in ("bfloat16", "float16", "float32")),
    ]


def run_all_calls(experts: TritonExperts, dtype: torch.dtype) -> None:
    """Make every call that a model makes: 1 to 16 tokens, 17 to 8192, any number of experts, views at any address."""

    def numbers(*shape: int, skip: int = 0) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.zeros(count + skip, dtype=torch.int32)[skip:].view(shape)

    arena = torch.zeros(2, -(-experts.plan.record_bytes // 64) * 64, dtype=torch.uint8)
    for num_tokens in (1, 2, 15, 16):
        for skip in (0, 1, 3):
            x = torch.zeros(num_tokens * WIDTH + skip, dtype=dtype)[skip:].view(num_tokens, WIDTH)
            weights = torch.zeros(num_tokens * TOP_K + skip)[skip:].view(num_tokens, TOP_K)
            for num_experts, layer in ((1, 0), (16, 1), (128, 16), (333, 47)):
                chosen, row = torch.zeros(num_tokens, TOP_K, dtype=torch.int64), numbers(num_experts, skip=skip)
                experts.lookup(x, arena, chosen, row, numbers(48), layer, weights)
            experts.decode(x, arena, numbers(num_tokens, TOP_K, skip=skip), weights)
            for pairs in (1, num_tokens, num_tokens * TOP_K):
                experts.pairs(x, arena, numbers(pairs, skip=skip), numbers(pairs, skip=skip))
            experts.combine(torch.zeros(num_tokens * TOP_K, WIDTH), weights, dtype)
    for num_tokens in (17, 128, 129, 512, 513, 2048, 2049, 8192):
        x, outputs = torch.empty(num_tokens, WIDTH, dtype=dtype), torch.empty(num_tokens, WIDTH)
        for num_experts, skip in ((1, 0), (2, 1), (16, 0), (128, 3), (333, 0)):
            entries, ends = numbers(num_tokens, skip=skip), numbers(num_experts + 1, skip=skip)
            experts.prefill(x, arena, numbers(num_experts, skip=skip), entries, ends, entries, outputs)


def count_kernels(model: Model, dtype: torch.dtype, arch: int = 86) -> int:
    """Return how many kernels a model compiles in its life."""
    with Card(arch) as card:
        run_all_calls(model.experts(), dtype)
    return len(card.kernels)


def compiled(arch: int, models: list[Model], one_of: int) -> Iterator[tuple[str, Kernel, Compiled]]:
    """Compile the kernels of models for a card; give each with a line that names it. `one_of`: see `check`."""
    seen = set()
    cards = list(SHARED_BYTES)
    for model in models if one_of == 1 else models[cards.index(arch) :: len(cards)]:
        for dtype in DTYPES:
            with Card(arch) as card:
                run_all_calls(model.experts(), dtype)
            for key, kernel in card.kernels.items():
                if key in seen:
                    continue
                seen.add(key)
                line = f"sm_{arch} {model.name}: {kernel.describe()}"
                if zlib.crc32(line.encode()) % one_of == 0:
                    yield line, kernel, card.compile(kernel)


def faults(arch: int, kernel: Kernel, made: Compiled) -> list[str]:
    """Return which limits a kernel breaks."""
    found = []
    if made.shared_bytes > SHARED_BYTES[arch]:
        found.append(f"{made.shared_bytes} bytes of shared memory, the card has {SHARED_BYTES[arch]}")
    if made.local_bytes > MAX_LOCAL_BYTES:
        found.append(f"{made.local_bytes} bytes of local memory a thread, allowed are {MAX_LOCAL_BYTES}")
    if kernel.name == "multiply_groups" and kernel.signature["inputs"] != "*fp32" and not made.is_on_tensor_cores:
        found.append("no tensor cores")
    return found


def check(arch: int, models: list[Model], one_of: int = 1) -> list[str]:
    """Compile for a card, print a line a kernel, and return those that break a limit.

    Args:
        arch: such as 86.
        models: whose kernels.
        one_of: 1 takes all; N each model for one of the cards and of its kernels every N-th, at random.
    """
    wrong = []
    for line, kernel, made in compiled(arch, models, one_of):
        broken = faults(arch, kernel, made)
        tensor_cores = ", tensor cores" if made.is_on_tensor_cores else ""
        print(
            f"{line}: {made.registers} registers, {made.local_bytes} B local, {made.shared_bytes} B shared"
            f"{tensor_cores}{''.join(f' ! {fault}' for fault in broken)}",
            flush=True,
        )
        wrong += [f"{line}: {fault}" for fault in broken]
    return wrong


def check_sums(arch: int, models: list[Model]) -> list[str]:
    """Return the models whose `decode` does not add in the order of `pairs`: they would differ in the last bits."""
    wrong = []
    for model in models:
        with Card(arch) as card:
            run_all_calls(model.experts(), torch.bfloat16)
        made = {
            kernel.name: card.compile(kernel).sums
            for kernel in card.kernels.values()
            if kernel.name in ("multiply_pairs", "multiply_and_sum") and kernel.signature["inputs"] == "*fp32"
        }
        if not made["multiply_pairs"] or made["multiply_pairs"] != made["multiply_and_sum"]:
            wrong.append(f"sm_{arch} {model.name}: decode adds in another order than pairs")
    return wrong


def main() -> int:
    """Check the kernels that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one-of", type=int, default=1, help="compile a part: one kernel of so many")
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_BYTES), choices=SHARED_BYTES)
    parser.add_argument("--formats", nargs="*", default=None, help="only models of these formats")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    counts = {model.name: [count_kernels(model, dtype) for dtype in DTYPES] for model in all_models()}
    wrong = [f"{name} compiles {found} kernels" for name, found in counts.items() if max(found) > MAX_KERNELS]
    print(f"{len(counts)} models compile {max(map(max, counts.values()))} kernels at most, allowed {MAX_KERNELS}")
    models = [model for model in all_models() if arguments.formats is None or model.format in arguments.formats]
    wrong += [line for arch in arguments.arch for line in check(arch, models, arguments.one_of)]
    different = {model.format: model for model in models}.values()
    wrong += [line for arch in arguments.arch[:1] for line in check_sums(arch, list(different)[:: arguments.one_of])]
    print(*wrong, sep="\n")
    print(f"{len(wrong)} limits broken, {time.perf_counter() - begin:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
