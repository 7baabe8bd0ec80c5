"""Types that all rooms share: keys of experts, tiers, and how the bytes of an expert lie in memory.

Knows sizes and shapes. Knows nothing of torch.
"""

from enum import Enum
from typing import NamedTuple

# safetensors' own dtype names, with the bytes of one element.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
}  # fmt: skip

# Slots and records begin at multiples of this, as O_DIRECT asks of memory and of offsets in a file.
PAGE_BYTES = 4096
# Tensors inside a record begin at multiples of this: a cache line, and the same for every slot, so that a
# matrix kernel takes the same path wherever an expert lies.
TENSOR_ALIGNMENT_BYTES = 64


def align_up(num_bytes: int, alignment: int) -> int:
    """Return `num_bytes` rounded up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


class ExpertKey(NamedTuple):
    """One expert of one MoE layer. Layers count MoE layers only, in the order the model holds them."""

    layer: int
    expert: int


class Tier(str, Enum):
    """Where a copy to the device takes an expert's bytes from."""

    HOST = "host"
    DISK = "disk"


class TensorSpec(NamedTuple):
    """One tensor of an expert inside its record.

    Args:
        name: parameter name on the experts module, such as "gate_up_proj".
        dtype: safetensors dtype name.
        shape: one expert's shape, without the expert dimension.
        offset: bytes from the start of the record.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            size *= dim
        return size


class MatrixSpec(NamedTuple):
    """A matrix of an expert that is stored in a weight format (`moeflow.kernels.quantization.formats`).

    Args:
        name: parameter name on the experts module; its codes, scales and zeros are tensors of the record.
        format: name of the format.
        shape: [N, K]: out features, in features. Always in this order, whatever the module's own is.
    """

    name: str
    format: str
    shape: tuple[int, int]


class RecordLayout(NamedTuple):
    """How one expert lies in a slot.

    Args:
        tensors: the stored tensors, each aligned.
        num_bytes: bytes in all.
        matrices: how tensors make up matrices; empty where every tensor is a parameter as the module has it.
    """

    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    matrices: tuple[MatrixSpec, ...] = ()

    @classmethod
    def pack(
        cls, tensors: list[tuple[str, str, tuple[int, ...]]], matrices: tuple[MatrixSpec, ...] = ()
    ) -> "RecordLayout":
        """Lay `(name, dtype, shape)` tensors one after another, each at a multiple of 64 bytes."""
        specs, offset = [], 0
        for name, dtype, shape in tensors:
            spec = TensorSpec(name, dtype, tuple(shape), offset)
            specs.append(spec)
            offset = align_up(offset + spec.num_bytes, TENSOR_ALIGNMENT_BYTES)
        return cls(tuple(specs), offset, tuple(matrices))


class LayerLayout(NamedTuple):
    """The routed experts of one MoE layer.

    Args:
        name: module path.
        num_experts: how many.
        record: the record of each; of the largest where they differ.
        variants: the distinct records, where experts are stored in different formats; else empty.
        variant_of: [num_experts], which of `variants` an expert has.
    """

    name: str
    num_experts: int
    record: RecordLayout
    variants: tuple[RecordLayout, ...] = ()
    variant_of: tuple[int, ...] = ()

    @property
    def records(self) -> tuple[RecordLayout, ...]:
        """The distinct records of its experts."""
        return self.variants or (self.record,)

    def record_of(self, expert: int) -> RecordLayout:
        """Return the record of one expert."""
        return self.variants[self.variant_of[expert]] if self.variants else self.record


def records_of(layouts: list[LayerLayout]) -> list[list[RecordLayout]]:
    """Return the record of every expert, [num_layers][num_experts]; equal records are one object."""
    one: dict[RecordLayout, RecordLayout] = {}
    return [
        [one.setdefault(record, record) for record in map(layout.record_of, range(layout.num_experts))]
        for layout in layouts
    ]
