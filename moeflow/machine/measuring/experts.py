"""Speed of the experts' kernels in each weight format: bytes of weights a second with few tokens, FLOP with many.

Knows kernels and formats. Knows nothing of models or caches.
"""

import math
import zlib
from collections.abc import Callable

import torch

from moeflow.core import MatrixSpec, RecordLayout
from moeflow.dtypes import tensors_of
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import lossless
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import library
from moeflow.kernels.cpu.structs import ExpertKernel
from moeflow.kernels.expert_mlp import expert_mlp
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, LOSSLESS, WeightFormat, lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.quantization.quantize import quantize
from moeflow.machine.measuring.memory import beyond_cache_bytes
from moeflow.machine.measuring.timing import median_seconds
from moeflow.machine.profile import MANY_TOKENS

MEASURED = {"bf16": "bfloat16", "int8": "int8", "int4-g64": "int4-g64", "bf16-lossless": LOSSLESS, "mxfp4": "mxfp4",
            "fp8": "fp8", "float32": "float32"}  # fmt: skip
FEW_TOKENS = (1, 4, 16, 64)
_TOP_K = 4  # experts of a call
_CHECKED_BYTES = 4 << 20
_FEATURES, _INTERMEDIATE = 1024, 768
_SHAPES = {"gate_up_proj": (2 * _INTERMEDIATE, _FEATURES), "down_proj": (_FEATURES, _INTERMEDIATE)}
_ACTIVATION = Activation("silu", "concatenated")


class Experts:
    """One random expert at so many places in memory that no cache holds them.

    Args:
        name: of the format, as the profile has it.
    """

    def __init__(self, name: str) -> None:
        tensors, formats = {}, {}
        for number, (matrix, shape) in enumerate(_SHAPES.items()):
            formats[matrix], stored = _stored(MEASURED[name], matrix, shape, number)
            tensors.update(stored)
        self._formats = formats
        is_float = all(spec.kind == "float" for spec in formats.values())
        self.record = RecordLayout.pack(
            [one for matrix, shape in _SHAPES.items() for one in formats[matrix].tensors(matrix, shape)],
            () if is_float else tuple(MatrixSpec(matrix, formats[matrix].name, _SHAPES[matrix]) for matrix in _SHAPES),
        )
        count = max(-(-beyond_cache_bytes() // self.record.num_bytes), 2 * _TOP_K)
        self._memory = torch.empty(count, self.record.num_bytes, dtype=torch.uint8)
        for key, part in tensors_of(self._memory[0], self.record).items():
            part.copy_(tensors[key].view(part.dtype))
        self._memory[1:] = self._memory[0]
        self._next = 0
        self._kernel = None if library() is None else ExpertKernel.build(self.record, _ACTIVATION, is_transposed=False)
        self._bits = 0 if name == "float32" else 16
        self._dtype = torch.float32 if name == "float32" else torch.bfloat16

    def read_rate(self, num_tokens: int, seconds: float) -> float:
        """Return bytes of weights a second where each expert has so many tokens."""
        return _TOP_K * self.record.num_bytes / median_seconds(self.call(num_tokens, _TOP_K), seconds)

    def flops(self, seconds: float) -> float:
        """Return FLOP a second where an expert has many tokens."""
        operations = 2 * MANY_TOKENS * sum(math.prod(shape) for shape in _SHAPES.values())
        return operations / median_seconds(self.call(MANY_TOKENS, 1), seconds)

    def tokens(self, count: int) -> torch.Tensor:
        """Return random tokens [count, H], the same each time."""
        return torch.randn(count, _FEATURES, generator=torch.Generator().manual_seed(0)).to(self._dtype)

    def call(self, num_tokens: int, num_experts: int) -> Callable[[], torch.Tensor]:
        """Return a call that runs the next experts in memory, each with all tokens, and returns the first's outputs."""
        x, kernel = self.tokens(num_tokens), self._kernel
        if kernel is None:
            return lambda: torch.stack([self.in_torch(x, place) for place in self._places(num_experts)])[0]
        kernels, begin = [kernel] * num_experts, self._memory.data_ptr()
        weights = torch.full((1, num_experts), 1 / num_experts, dtype=self._dtype)
        starts = [num_tokens * expert for expert in range(num_experts + 1)]
        tokens, places = list(range(num_tokens)) * num_experts, list(range(num_tokens * num_experts))
        out = torch.empty(len(places), _FEATURES)

        def run() -> torch.Tensor:
            addresses = [begin + place * self.record.num_bytes for place in self._places(num_experts)]
            if num_tokens == 1:  # as the runtime does, of all experts at once
                return cpu.run_token(x, kernels, addresses, weights, activation_bits=self._bits)
            cpu.run_experts(x, kernels, addresses, starts, tokens, places, out, activation_bits=self._bits)
            return out[:num_tokens]

        return run

    def in_torch(self, x: torch.Tensor, place: int = 0) -> torch.Tensor:
        """Run an expert as the runtime does without compiled kernels."""
        tensors = tensors_of(self._memory[place], self.record)
        weights = {
            matrix: tensors[matrix]
            if self._formats[matrix].kind == "float"
            else dequantize(tensors, matrix, self._formats[matrix], shape, x.dtype)
            for matrix, shape in _SHAPES.items()
        }
        return expert_mlp(x, weights, activation=_ACTIVATION.apply)

    def _places(self, count: int) -> list[int]:
        found = [(self._next + number) % len(self._memory) for number in range(count)]
        self._next = (self._next + count) % len(self._memory)
        return found


def _stored(name: str, matrix: str, shape: tuple[int, int], seed: int) -> tuple[WeightFormat, dict[str, torch.Tensor]]:
    """Return a format and a random matrix of unit gain in it, by the names of its tensors."""
    generator, gain = torch.Generator().manual_seed(seed), 1 / math.sqrt(shape[1])
    if name == LOSSLESS:
        parts = encode_lossless((torch.randn(shape, generator=generator) * gain).bfloat16())
        names = (matrix, f"{matrix}_top", f"{matrix}_escapes")
        return lossless_format(parts[2].numel() // 5), dict(zip(names, parts, strict=True))
    spec = FORMATS[name]
    if spec.kind not in ("mxfp4", "fp8"):
        values = torch.randn(shape, generator=generator) * gain
        return spec, {key.replace("weight", matrix, 1): part for key, part in quantize(values, spec).items()}
    tensors = {}
    for key, dtype, size in spec.tensors(matrix, shape):
        if dtype == "U8":
            tensors[key] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        else:
            tensors[key] = torch.rand(size, generator=generator) * gain / 128
    if spec.kind == "mxfp4":
        tensors[f"{matrix}_scale"] = tensors[f"{matrix}_scale"] % 3 + 120
    else:
        tensors[matrix][tensors[matrix] & 127 == 127] = 0  # not a number
    return spec, tensors


def check_speeds(seconds: float) -> dict[str, float]:
    """Measure what a packed expert is checked with when it is first read.

    Args:
        seconds: for all checks.

    Returns:
        "checksum", and where kernels are compiled "lossless" -> bytes a second on one core.
    """
    record = torch.randint(0, 256, (_CHECKED_BYTES,), dtype=torch.uint8).numpy()
    found = {"checksum": record.nbytes / median_seconds(lambda: zlib.crc32(record.data), seconds / 2)}
    if library() is not None:
        shape = _SHAPES["gate_up_proj"]
        spec, parts = _stored(LOSSLESS, "weight", shape, 0)
        codes, tops, escapes = parts.values()
        check = median_seconds(lambda: lossless.decode(codes, tops, escapes, shape, None), seconds / 2)
        found["lossless"] = spec.num_bytes(shape) / check
    return found


def expert_speeds(seconds: float, formats: tuple[str, ...] = tuple(MEASURED)) -> tuple[dict, dict[str, float]]:
    """Measure the experts' kernels.

    Args:
        seconds: for all formats.
        formats: of the profile's names.

    Returns:
        Format -> tokens of an expert -> bytes of weights a second; format -> FLOP a second with many tokens.
    """
    if library() is None:
        formats = tuple(name for name in formats if MEASURED[name] != LOSSLESS)  # only compiled kernels read it
    each = seconds / len(formats) / (len(FEW_TOKENS) + 1)
    read: dict[str, dict[int, float]] = {}
    flops: dict[str, float] = {}
    with torch.inference_mode():
        for name in formats:
            experts = Experts(name)
            read[name] = {count: experts.read_rate(count, each) for count in FEW_TOKENS}
            flops[name] = experts.flops(each)
    return read, flops
