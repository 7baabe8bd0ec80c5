"""Formats that experts may be stored in, as rows of a table: their bytes, the kernel that reads them, what they cost.

Knows shapes. Knows nothing of models or machines.
"""

import math
from dataclasses import dataclass

from moeflow.core import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, LayerLayout, align_up
from moeflow.kernels.quantization.formats import LOSSLESS, find_format

PUBLISHED = "as published"
MIXED = "mixed"  # a width for each expert
KERNELS = {"F64": "float64", "F32": "float32", "BF16": "bf16", "F16": "float16"}
# Of its bytes in bfloat16, by the exponents of trained models (docs/lossless.md); only reading the weights says more.
LOSSLESS_SHARE = 0.755


@dataclass(frozen=True)
class StoredAs:
    """A way to store experts.

    Args:
        name: "as published", "lossless", "int8", "int4", or "mixed at N bits".
        kernel: format whose kernel reads them, as a machine's profile names it.
        rank: 0 loses nothing, higher loses more.
        bits: of a weight, scales and zeros included; 0 where the headers say.
        is_packed: whether an expert is one read.
        is_published: whether the model lies on the disk so.
    """

    name: str
    kernel: str
    rank: int
    bits: float = 0.0
    is_packed: bool = True
    is_published: bool = False

    def slot_bytes(self, shapes: tuple[tuple[int, ...], ...]) -> int:
        """Return the bytes of an expert's slot: matrices in this format, other tensors in 16 bits, in whole pages."""
        total = 0
        for shape in shapes:
            if len(shape) < 2:
                size = 2 * math.prod(shape)
            elif self.kernel in ("int8-g64", "int4-g64"):
                size = find_format(self.kernel).num_bytes((math.prod(shape[:-1]), shape[-1]))
            else:
                size = math.ceil(math.prod(shape) * self.bits / 8)
            total += align_up(size, TENSOR_ALIGNMENT_BYTES)
        return align_up(total, PAGE_BYTES)

    @property
    def is_exact(self) -> bool:
        """Whether every bit of the published weights stays."""
        return self.rank == 0


def published_as(kernel: str, *, bits: float = 0.0, label: str = "") -> StoredAs:
    """Return the way in which a model lies on the disk.

    Args:
        kernel: the format, as a machine's profile names it.
        bits: of a weight, for a packed folder; else 0.
        label: in place of the kernel's name.
    """
    label = f"{bits:.1f} bits, mixed" if kernel == MIXED else label or kernel
    return StoredAs(f"{PUBLISHED} ({label})", kernel, 0, bits, is_packed=bits > 0, is_published=True)


def kernel_of(layouts: list[LayerLayout]) -> str:
    """Return what experts are stored in, as a machine's profile names it; "mixed" for several widths.

    Of GGML's blocks, of which a file has several types, it is the one with most bytes.
    """
    records = [record for layout in layouts for record in layout.records]
    kinds = {matrix.format for record in records for matrix in record.matrices}
    if not kinds:
        return KERNELS[records[0].tensors[0].dtype]
    if any(find_format(kind).kind in ("ggml", "float") for kind in kinds):
        return most_of(_bytes_of_formats(layouts))
    if any(kind.startswith(LOSSLESS) for kind in kinds):
        return LOSSLESS
    return kinds.pop() if len(kinds) == 1 else MIXED


def most_of(held: dict[str, int]) -> str:
    """Return the format with most bytes, as a machine's profile names it."""
    name = max(held, key=lambda one: (held[one], one))
    return KERNELS.get(find_format(name).dtype, name)


def _bytes_of_formats(layouts: list[LayerLayout]) -> dict[str, int]:
    held: dict[str, int] = {}
    for layout in layouts:
        for matrix in (one for e in range(layout.num_experts) for one in layout.record_of(e).matrices):
            held[matrix.format] = held.get(matrix.format, 0) + find_format(matrix.format).num_bytes(matrix.shape)
    return held


def other_formats(published: StoredAs) -> list[StoredAs]:
    """Return the formats that a model could be written in, from the one that loses least.

    Args:
        published: how it lies on the disk; one that is in a weight format stays as it is.
    """
    if published.kernel not in KERNELS.values():
        return []
    exact = [StoredAs("lossless", LOSSLESS, 0, 16 * LOSSLESS_SHARE)] if published.kernel == "bf16" else []
    return [
        *exact,
        StoredAs("int8", "int8-g64", 1, 8.25),
        StoredAs("int4", "int4-g64", 2, 4.5),
        StoredAs("mixed at 3 bits", MIXED, 3, 3.5),
    ]


def mean_bits(layouts: list[LayerLayout]) -> float:
    """Return the bits of a weight of packed experts, on average."""
    held, weights = 0, 0
    for layout in layouts:
        for expert in range(layout.num_experts):
            record = layout.record_of(expert)
            held += 8 * record.num_bytes
            weights += sum(math.prod(one.shape) for one in record.matrices or record.tensors)
    return held / max(weights, 1)
