"""The plan of a stored matrix for the Triton kernels: constants of one compiled kernel, and its block sizes.

Knows formats and record layouts. Knows nothing of Triton itself, which may be absent.
"""

from typing import NamedTuple

from moeflow.core import RecordLayout
from moeflow.kernels.quantization.formats import BLOCK, FORMAT_OF_DTYPE, WeightFormat, find_format, holds_matrix

FLOAT_DTYPES = ("F32", "BF16", "F16")
BLOCK_FORMATS = (
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "ggml_mxfp4",
)  # fmt: skip
"""Those of GGML's blocks that the kernels read."""

# Blocks by kind and bits: rows of the matrix a program takes, blocks of 32 in features a step takes. One entry a
# format, never tuned at run time: the order in which products are summed, and so every bit, depends on it.
_DECODE_BLOCKS = {
    ("float", 32): (8, 8),
    ("float", 16): (8, 16),
    ("lossless", 12): (2, 16),  # blocks as bfloat16: the same order of sums; fewer rows, for escapes take registers
    ("int", 8): (8, 16),
    ("fp8", 8): (8, 16),
    ("uint", 4): (16, 16),
    ("mxfp4", 4): (16, 16),
    ("uint", 3): (16, 16),
    ("uint", 2): (16, 16),
    ("sign", 1): (16, 8),
    **{("ggml", bits): (8, 16) for bits in (8, 6, 5, 4, 3, 2)},
}
_PREFILL_BLOCKS = {
    ("float", 32): (64, 1),
    ("float", 16): (64, 2),
    ("lossless", 12): (32, 2),
    ("int", 8): (64, 2),
    ("fp8", 8): (64, 2),
    ("uint", 4): (64, 4),
    ("mxfp4", 4): (64, 2),
    ("uint", 3): (64, 4),
    ("uint", 2): (64, 4),
    ("sign", 1): (64, 2),
    **{("ggml", bits): (64, 2) for bits in (8, 6, 5, 4, 3, 2)},
}
# Likewise of the second matrix, whose programs take a token's experts one after another: fewer rows, more programs.
_DOWN_BLOCKS = {
    ("float", 32): (4, 8),
    ("float", 16): (4, 16),
    ("lossless", 12): (2, 16),
    ("int", 8): (4, 32),
    ("fp8", 8): (4, 32),
    ("uint", 4): (4, 32),
    ("mxfp4", 4): (4, 32),
    ("uint", 3): (4, 32),
    ("uint", 2): (4, 32),
    ("sign", 1): (4, 32),
    **{("ggml", bits): (4, 16) for bits in (8, 6, 5, 4, 3, 2)},
}
# A matrix stored [in, out] is contiguous along its rows: a program takes as many as fill a cache line.
_TRANSPOSED_DECODE_BLOCKS = (64, 2)
_TRANSPOSED_DOWN_BLOCKS = (32, 4)
# Runs of neighbours into which a block of 32 values is unpacked: one shift of the loaded bytes each.
_PLANES = {("uint", 4): 2, ("uint", 3): 4, ("uint", 2): 4}
# float32 activations are multiplied without tensor cores, where larger tiles than these spill registers.
_EXACT_ROWS, EXACT_TILE_TOKENS = 32, 32


class MatrixPlan(NamedTuple):
    """The place of a matrix in a record and the way it is read.

    Args:
        num_rows: N, out features.
        in_features: K.
        spec: its format.
        is_transposed: whether it lies [K, N]; float formats only.
        codes_at: bytes from the start of the record; likewise the next three, -1 where there is no such tensor.
        scale_at: its scales.
        zero_at: its zeros.
        bias_at: its bias.
        bias_dtype: safetensors dtype name of the bias.
        top_at: its rows' tops, of the lossless format.
        escapes_at: likewise its escapes.
    """

    num_rows: int
    in_features: int
    spec: WeightFormat
    is_transposed: bool
    codes_at: int
    scale_at: int = -1
    zero_at: int = -1
    bias_at: int = -1
    bias_dtype: str = "F32"
    top_at: int = -1
    escapes_at: int = -1

    @classmethod
    def find(cls, record: RecordLayout, name: str, *, is_transposed: bool) -> "MatrixPlan | None":
        """Plan the matrix called `name`.

        Args:
            record: of the expert.
            name: of the matrix.
            is_transposed: whether the module stores matrices [in, out]; those in a format never are.

        Returns:
            The plan, or None where the kernels cannot read it.
        """
        tensors = {tensor.name: tensor for tensor in record.tensors}
        codes, bias = tensors.get(name), tensors.get(f"{name}_bias")
        if codes is None or (bias is not None and bias.dtype not in FLOAT_DTYPES):
            return None
        matrix = next((matrix for matrix in record.matrices if matrix.name == name), None)
        if matrix is not None:
            spec, (num_rows, in_features), is_transposed = find_format(matrix.format), matrix.shape, False
        elif codes.dtype in FORMAT_OF_DTYPE and len(codes.shape) == 2:
            spec = FORMAT_OF_DTYPE[codes.dtype]
            num_rows, in_features = codes.shape[::-1] if is_transposed else codes.shape
        else:
            return None
        if (spec.kind, spec.bits) not in _DECODE_BLOCKS or min(num_rows, in_features) < 1:
            return None
        if spec.kind == "ggml" and spec.name not in BLOCK_FORMATS:
            return None
        if not holds_matrix(record, name, spec, (num_rows, in_features)):
            return None
        if spec.kind == "lossless":
            plan = cls(
                num_rows, in_features, spec, is_transposed, codes.offset,
                top_at=tensors[f"{name}_top"].offset, escapes_at=tensors[f"{name}_escapes"].offset,
            )  # fmt: skip
            return plan if bias is None else plan._replace(bias_at=bias.offset, bias_dtype=bias.dtype)
        plan = cls(
            num_rows, in_features, spec, is_transposed, codes.offset,
            scale_at=-1 if spec.kind in ("float", "ggml") else tensors[f"{name}_scale"].offset,
            zero_at=tensors[f"{name}_zero"].offset if spec.has_zeros else -1,
        )  # fmt: skip
        return plan if bias is None else plan._replace(bias_at=bias.offset, bias_dtype=bias.dtype)

    def constants(self) -> dict:
        """Return the matrix's compile-time constants."""
        return {
            "N": self.num_rows,
            "K": self.in_features,
            "PADDED_K": self.spec.padded(self.in_features),
            "KIND": self.spec.name if self.spec.kind == "ggml" else self.spec.kind,
            "BITS": self.spec.bits,
            "GROUP": self.spec.group_size or self.spec.padded(self.in_features),
            "BLOCK_BYTES": self.spec.block_bytes,
            "PLANES": self.num_planes,
            "DTYPE": self.spec.dtype,
            "IS_TRANSPOSED": self.is_transposed,
            "CODES_AT": self.codes_at,
            "SCALE_AT": self.scale_at,
            "ZERO_AT": self.zero_at,
            "BIAS_AT": self.bias_at,
            "BIAS_DTYPE": self.bias_dtype,
            "TOP_AT": self.top_at,
            "ESCAPES_AT": self.escapes_at,
            "NUM_ESCAPES": self.spec.num_escapes,
            "SEARCH_STEPS": self.spec.num_escapes.bit_length(),
        }

    def decode_blocks(self) -> tuple[int, int]:
        """Return (rows, blocks of 32 in features) for one token; of an expert's first matrix."""
        rows, blocks = _DECODE_BLOCKS[self.spec.kind, self.spec.bits]
        if self.is_transposed:
            rows, blocks = _TRANSPOSED_DECODE_BLOCKS
        return rows, self._at_most(blocks)

    def down_blocks(self) -> tuple[int, int]:
        """Return the same of the second matrix."""
        rows, blocks = _DOWN_BLOCKS[self.spec.kind, self.spec.bits]
        if self.is_transposed:
            rows, blocks = _TRANSPOSED_DOWN_BLOCKS
        return rows, self._at_most(blocks)

    def prefill_blocks(self, *, is_exact: bool) -> tuple[int, int]:
        """Return (rows, blocks of 32 in features) for a tile of tokens; `is_exact` for float32 activations."""
        rows, blocks = _PREFILL_BLOCKS[self.spec.kind, self.spec.bits]
        fewest = 2 if self.num_planes > 2 else 1  # a tile product takes at least 16 in features a run
        if is_exact:
            return _EXACT_ROWS, fewest
        return rows, max(fewest, self._at_most(blocks))

    @property
    def num_planes(self) -> int:
        """Number of runs into which a block of 32 values is unpacked."""
        return _PLANES.get((self.spec.kind, self.spec.bits), 1)

    def _at_most(self, blocks) -> int:
        num_blocks = -(-self.in_features // BLOCK)
        return min(blocks, 1 << (num_blocks - 1).bit_length())
