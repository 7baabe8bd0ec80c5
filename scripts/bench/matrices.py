"""What bench_kernels multiplies: a matrix in a format, more often than a cache holds, and torch's own kernels."""

import math

import torch
import torch.nn.functional as F

from bench.rounds import Case
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, LOSSLESS, WeightFormat, lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.quantization.quantize import quantize

# Of relative norm against float64: of float32 activations, of bfloat16 ones, of those rounded to integers.
FLOAT32_BOUND, BFLOAT16_BOUND, ROUNDED_BOUND = 1e-5, 1e-2, 1e-2
TORCH_BOUND = 3e-2  # torch's kernels round in between: only to see that they compute the same
ACTIVATION_BITS = 16
TORCH_GROUP = 64  # of torch's int4


class WrongResult(Exception):
    """A kernel's result that differs from float64 arithmetic by more than the bound."""


def check(found: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> float:
    """Return the relative norm of an error.

    Raises:
        WrongResult: it is above the bound.
    """
    error = ((found.double() - expected).norm() / expected.norm()).item()
    if not error <= bound:
        raise WrongResult(f"{what}: the error's relative norm is {error:.2e}, the bound {bound:.0e}")
    return error


def random_matrix(spec: WeightFormat, shape: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a random matrix [N, K] of unit gain, under the name "weight"."""
    generator = torch.Generator().manual_seed(seed)
    gain = 1 / math.sqrt(shape[1])
    if spec.kind == "ggml":
        ((name, _, size),) = spec.tensors("weight", shape)
        blocks = torch.empty(size, dtype=torch.uint8)
        fill_blocks(blocks, spec, generator)
        return {name: blocks}
    if spec.kind not in ("mxfp4", "fp8"):
        return quantize(torch.randn(shape, generator=generator) * gain, spec)
    tensors = {}
    for name, dtype, size in spec.tensors("weight", shape):
        if dtype == "U8":
            tensors[name] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = torch.rand(size, generator=generator) * gain / 128
    if spec.kind == "mxfp4":
        tensors["weight_scale"] = tensors["weight_scale"] % 3 + 120
    else:
        tensors["weight"][tensors["weight"] & 127 == 127] = 0  # not a number
    return tensors


def fill_blocks(blocks: torch.Tensor, spec: WeightFormat, generator: torch.Generator | None = None) -> None:
    """Fill uint8 [N, bytes] with random blocks of GGML's, of whose bytes any two are a small half."""
    blocks.random_(0, 56, generator=generator)
    if spec.name == "ggml_mxfp4":
        blocks[:, :: spec.block_bytes] += 64  # powers of two of a usual size


def stored_matrix(name: str, shape: tuple[int, int]) -> tuple[WeightFormat, dict[str, torch.Tensor]]:
    """Return a format by its name, without its escapes where it is lossless, and a random matrix [N, K] in it."""
    if name != LOSSLESS:
        return FORMATS[name], random_matrix(FORMATS[name], shape)
    parts = encode_lossless(random_matrix(FORMATS["bfloat16"], shape)["weight"])
    names = ("weight", "weight_top", "weight_escapes")
    return lossless_format(parts[2].numel() // 5), dict(zip(names, parts, strict=True))


class Copies:
    """One matrix in a format, at several places in memory.

    Args:
        name: of the format.
        shape: [N, K].
        working_set_bytes: all copies together are at least so long.
    """

    def __init__(self, name: str, shape: tuple[int, int], working_set_bytes: int):
        self.shape = shape
        self.spec, self.tensors = stored_matrix(name, shape)
        self.matrix_bytes = self.spec.num_bytes(shape)
        self.count = max(-(-working_set_bytes // self.matrix_bytes), 1)
        self._kernels = [
            cpu.LinearKernel({key: tensor.clone() for key, tensor in self.tensors.items()}, "weight", self.spec, shape)
            for _ in range(self.count)
        ]
        self.weight = dequantize(self.tensors, "weight", self.spec, shape, torch.float64)

    @property
    def has_codes(self) -> bool:
        """Whether rounded activations may meet integer codes here."""
        return self.spec.kind not in ("float", "fp8", "lossless")

    def check(self, num_tokens: int) -> dict[str, float]:
        """Compare every copy's products with float64's.

        Returns:
            The errors' relative norms: of float32 activations, of bfloat16 ones, of rounded ones where there are any.

        Raises:
            WrongResult: an error is above its bound, or two copies differ in a bit.
        """
        kinds = {"float32": (torch.float32, 0, FLOAT32_BOUND), "bfloat16": (torch.bfloat16, 0, BFLOAT16_BOUND)}
        if self.has_codes:
            kinds["rounded"] = (torch.float32, ACTIVATION_BITS, ROUNDED_BOUND)
        errors = {}
        for kind, (dtype, bits, bound) in kinds.items():
            what = f"{self.spec.name}, {num_tokens} tokens, activations {kind}"
            x = activations(num_tokens, self.shape[1], dtype)
            first, other = (torch.full((num_tokens, self.shape[0]), torch.nan, dtype=dtype) for _ in range(2))
            self._kernels[0](x, first, activation_bits=bits)
            errors[kind] = check(first, x.double() @ self.weight.T, bound, what)
            for kernel in self._kernels[1:]:
                kernel(x, other, activation_bits=bits)
                if not torch.equal(first, other):
                    raise WrongResult(f"{what}: copies of one matrix give different bits")
        return errors

    def case(self, name: str, num_tokens: int, bits: int = 0) -> Case:
        """Return the product of all copies with bfloat16 activations."""
        x = activations(num_tokens, self.shape[1], torch.bfloat16)
        out = torch.empty(num_tokens, self.shape[0], dtype=torch.bfloat16)

        def run():
            for kernel in self._kernels:
                kernel(x, out, activation_bits=bits)

        return Case(name, run, self.count * self.matrix_bytes, self.count)

    def torch_cases(self) -> list[Case]:
        """Return torch's kernels for one token and this very matrix, checked; none for most formats."""
        if self.spec.name == f"int4-g{TORCH_GROUP}":
            return self._torch_int4()
        if self.spec.name == "int8":
            return self._torch_int8()
        return []

    def _torch_int4(self):
        from moeflow.kernels.quantization.packing import unpack_codes

        codes = unpack_codes(self.tensors["weight"], 4)[:, : self.shape[1]].int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale, zero = (self.tensors[f"weight_{part}"].float() for part in ("scale", "zero"))
        grid = torch.stack((scale, (8 - zero) * scale), dim=-1).transpose(0, 1).contiguous()  # [groups, N, 2]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        cases = []
        for dtype in (torch.bfloat16, torch.float32):
            cast = grid.to(dtype)

            def multiply(x, weight, cast=cast):
                return product(x, weight, TORCH_GROUP, cast)

            cases.append(self._torch_case(f"torch int4 {str(dtype).split('.')[1]}", multiply, packed, dtype))
        return cases

    def _torch_int8(self):
        codes = self.tensors["weight"].view(torch.int8)
        scale = self.tensors["weight_scale"].flatten().bfloat16()

        def multiply(x, weight):
            return torch._weight_int8pack_mm(x, weight, scale)

        return [self._torch_case("torch int8 bfloat16", multiply, codes, torch.bfloat16)]

    def _torch_case(self, name, multiply, weight, dtype):
        x = activations(1, self.shape[1], dtype)
        check(multiply(x, weight), x.double() @ self.weight.T, TORCH_BOUND, name)
        weights = [weight.clone() for _ in range(self.count)]

        def run():
            for copy in weights:
                multiply(x, copy)

        return Case(name, run, self.count * self.matrix_bytes, self.count)


def torch_linear(shape: tuple[int, int], working_set_bytes: int, num_tokens: int, dtype: torch.dtype) -> Case:
    """Return torch's own linear, over matrices [N, K] at several places."""
    x = activations(num_tokens, shape[1], dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [weight.clone() for _ in range(max(-(-working_set_bytes // weight.nbytes), 1))]

    def run():
        for copy in weights:
            F.linear(x, copy)

    return Case(f"torch {str(dtype).split('.')[1]}", run, len(weights) * weight.nbytes, len(weights))


def activations(num_tokens: int, num_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random activations [T, K], the same each time."""
    return torch.randn(num_tokens, num_features, generator=torch.Generator().manual_seed(1)).to(dtype)
