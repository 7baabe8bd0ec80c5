"""Weight formats: how a matrix [N, K] (N out features, K in features) lies in memory, bit by bit.

One format is one row of `FORMATS`. A matrix called `name` is stored as up to three tensors of a record:

- `name`: the codes, uint8 [N, Kp / 32 * 4 * bits]. K is padded to Kp, a multiple of 32 and of the group, and rows
  follow one another. In a float format: the values themselves, [N, K], and nothing else.
- `name_scale`: [N, Kp / group_size], float16; [ceil(N / 128), Kp / 128] float32 in fp8; uint8 (E8M0: 2^(byte - 127))
  [N, Kp / 32] in mxfp4.
- `name_zero`: [N, Kp / group_size], float16; in asymmetric formats only.

A bias, where there is one, is `name_bias`, [N], in a float dtype.

Codes. Values are packed in blocks of 32 neighbours of one row, 4 * bits bytes a block, so that one load and one shift
give a whole run of values:

| bits | the bytes of a block of values v0 .. v31 (unsigned codes) | a value |
|---|---|---|
| 8 | byte j is v_j, two's complement, -127 .. 127 | v * scale |
| 4 | byte j (of 16) has v_j in its low half and v_(j+16) in its high half | (v - zero) * scale |
| 3 | 8 bytes as for 2 bits with v & 3, then 4 bytes as for 1 bit with v >> 2 | (v - zero) * scale |
| 2 | byte j (of 8) has v_j, v_(j+8), v_(j+16), v_(j+24), from its low bits up | (v - zero) * scale |
| 1 | bit i of the little-endian 32-bit word is v_i | (2 v - 1) * scale |

Two formats are those of published checkpoints and keep their bytes:

- mxfp4 (OCP microscaling; gpt-oss): byte j of a block has v_(2j) in its low half and v_(2j+1) in its high half; a code
  is sign (bit 3) and E2M1 magnitude 0, .5, 1, 1.5, 2, 3, 4, 6; a value is that times 2^(scale byte - 127).
- fp8 (DeepSeek-V3, Qwen3): a byte is an E4M3 float, a value is that times the scale of its 128 x 128 block.

Padding (values beyond K) has any code; a kernel treats the activations there as zero.

One format loses nothing. `bf16-lossless-E` holds bfloat16 values in 12 bits and a little:

- `name`: uint8 [N, Kp / 64 * 96]; K is padded to a multiple of 64. A block of 64 values is 64 bytes of rests and 32
  bytes of codes. A rest is a value's sign (bit 7) and mantissa (bits 0 to 6). A code c of 0 to 14 says that the
  exponent is the row's top less c; 15 says that it is 0, of a zero or a denormal number, or that of an escape: a value
  with another exponent, which lies apart. Value 16 a + j of a block (a < 4, j < 16) has
  place p = 16 (j div 4) + 8 (a div 2) + 2 (j mod 4) + a mod 2, the order in which vectors of 8 and of 16 floats come
  out of two byte shuffles: its rest is byte p, its code the low half of code byte p for p < 32, else the high half of
  code byte p - 32.
- `name_top`: uint16 [N]: bits 0 to 7 are the row's top, bit 8 says that the row has an escape; the others are zero.
- `name_escapes`: uint8 [5 E]: E positions row * K + column, uint32, little-endian, rising, then E exponents, a byte
  each, none of them 0. Unused ones come last, with position 2^32 - 1 and exponent 0.

Padding has rest 0 and code 0.

The block formats of GGML, `q8_0` to `iq4_xs`, keep the bytes of GGUF files, which moeflow reads and does not write:

- `name`: uint8 [N, K / V * B], where a block of V values of a row is B bytes (`quantization/ggml.py`) and has codes,
  scales and minima in it. K is a multiple of V. Values are those of `quantization/ggml_values.py`.

Knows names, sizes and shapes. Knows nothing of tensors, files or models.
"""

import math
from typing import NamedTuple

from moeflow.core import DTYPE_BYTES, RecordLayout, align_up
from moeflow.errors import ConfigError
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

BLOCK = 32  # values packed together
LOSSLESS_BLOCK = 64
FP8_BLOCK = 128


class WeightFormat(NamedTuple):
    """How the values of a matrix are stored.

    Args:
        name: as users write it.
        kind: what a code means: "float", "int" (symmetric integers), "uint" (asymmetric), "sign", "mxfp4", "fp8",
            "lossless" or "ggml".
        bits: bits of one code.
        group_size: neighbours in a row that share a scale, or a block; 0 for a whole row. Unused in a float format.
        dtype: safetensors dtype name of the codes.
        num_escapes: E, for how many a lossless format has room.
        block_bytes: bytes of a block of GGML's.
    """

    name: str
    kind: str
    bits: int
    group_size: int = 0
    dtype: str = "U8"
    num_escapes: int = 0
    block_bytes: int = 0

    @property
    def has_zeros(self) -> bool:
        """Whether a zero point is stored with every scale."""
        return self.kind == "uint"

    def padded(self, in_features: int) -> int:
        """Return Kp: the in features with their padding."""
        if self.kind == "float":
            return in_features
        return align_up(in_features, LOSSLESS_BLOCK if self.kind == "lossless" else max(self.group_size, BLOCK))

    def num_groups(self, in_features: int) -> int:
        """Return the number of scales in a row."""
        return self.padded(in_features) // self.group_size if self.group_size else 1

    def tensors(self, name: str, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...]]]:
        """List the stored tensors of a matrix.

        Args:
            name: of the matrix.
            shape: [N, K], as the model has it.

        Returns:
            (name, safetensors dtype name, shape) in the order in which they lie in a record.

        Raises:
            ConfigError: K is no multiple of a block of GGML's.
        """
        num_rows, in_features = shape
        if self.kind == "float":
            return [(name, self.dtype, (num_rows, in_features))]
        if self.kind == "ggml":
            if in_features % self.group_size:
                raise ConfigError(
                    f"rows of {in_features} values do not divide into blocks of {self.name}. Allowed: multiples of "
                    f"{self.group_size}."
                )
            return [(name, self.dtype, (num_rows, in_features // self.group_size * self.block_bytes))]
        found: list[tuple[str, str, tuple[int, ...]]] = [
            (name, self.dtype, (num_rows, self.padded(in_features) * self.bits // 8))
        ]
        if self.kind == "lossless":
            return [*found, (f"{name}_top", "U16", (num_rows,)), (f"{name}_escapes", "U8", (5 * self.num_escapes,))]
        groups = self.num_groups(in_features)
        if self.kind == "fp8":
            return [*found, (f"{name}_scale", "F32", (-(-num_rows // FP8_BLOCK), groups))]
        found.append((f"{name}_scale", "U8" if self.kind == "mxfp4" else "F16", (num_rows, groups)))
        if self.has_zeros:
            found.append((f"{name}_zero", "F16", (num_rows, groups)))
        return found

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a matrix [N, K] with its scales and zeros."""
        return sum(DTYPE_BYTES[dtype] * math.prod(sizes) for _, dtype, sizes in self.tensors("", shape))


_GROUPS = (32, 64, 128)
_DEFAULT_GROUP = 64
_NARROW_BITS = {"ggml_mxfp4": 4, "ggml_nvfp4": 4}  # where no digit of the name says it


def _block_formats() -> dict[str, WeightFormat]:
    """Return the formats of GGML's blocks by their names."""
    found = {}
    for kind in BLOCK_TYPES.values():
        if kind.format and kind.block_values > 1:
            bits = _NARROW_BITS.get(kind.format) or int(next(filter(str.isdigit, kind.format)))
            found[kind.format] = WeightFormat(
                kind.format, "ggml", bits, kind.block_values, block_bytes=kind.block_bytes
            )
    return found


FORMATS: dict[str, WeightFormat] = {
    "float64": WeightFormat("float64", "float", 64, dtype="F64"),
    "float32": WeightFormat("float32", "float", 32, dtype="F32"),
    "bfloat16": WeightFormat("bfloat16", "float", 16, dtype="BF16"),
    "float16": WeightFormat("float16", "float", 16, dtype="F16"),
    "int8": WeightFormat("int8", "int", 8),
    **{f"int8-g{group}": WeightFormat(f"int8-g{group}", "int", 8, group) for group in _GROUPS},
    **{f"int{b}-g{group}": WeightFormat(f"int{b}-g{group}", "uint", b, group) for b in (4, 3, 2) for group in _GROUPS},
    **{f"int1-g{group}": WeightFormat(f"int1-g{group}", "sign", 1, group) for group in _GROUPS},
    "mxfp4": WeightFormat("mxfp4", "mxfp4", 4, BLOCK),
    "fp8": WeightFormat("fp8", "fp8", 8, FP8_BLOCK),
    **_block_formats(),
}
# Formats that a quantiser can write; the others are read from published checkpoints.
WRITABLE = tuple(name for name, spec in FORMATS.items() if spec.kind in ("int", "uint", "sign"))


def find_format(name: str) -> WeightFormat:
    """Return a format by its name; "int4" alone means groups of 64.

    Raises:
        ConfigError: there is none of that name.
    """
    for candidate in (name, f"{name}-g{_DEFAULT_GROUP}"):
        if candidate in FORMATS:
            return FORMATS[candidate]
    escapes = name.removeprefix(f"{LOSSLESS}-")
    if escapes != name and escapes.isascii() and escapes.isdigit() and str(int(escapes)) == escapes:
        return lossless_format(int(escapes))
    raise ConfigError(
        f"{name!r} is not a weight format. Allowed: {', '.join(FORMATS)}; int4, int3, int2 and int1 alone have groups "
        f"of {_DEFAULT_GROUP}."
    )


LOSSLESS = "bf16-lossless"
MOST_LOSSLESS_VALUES = 2**32 - 64  # of a matrix: positions are of 32 bits, and a kernel looks a block ahead


def lossless_format(num_escapes: int) -> WeightFormat:
    """Return the format of bfloat16 values that loses nothing.

    Args:
        num_escapes: how many escapes a matrix has room for.
    """
    return WeightFormat(f"{LOSSLESS}-{num_escapes}", "lossless", 12, num_escapes=num_escapes)


FORMAT_OF_DTYPE = {spec.dtype: spec for spec in FORMATS.values() if spec.kind == "float"}


def is_lossless(record: RecordLayout) -> bool:
    """Whether a record has matrices in the lossless format."""
    return any(matrix.format.startswith(LOSSLESS) for matrix in record.matrices)


def holds_matrix(record: RecordLayout, name: str, spec: WeightFormat, shape: tuple[int, int]) -> bool:
    """Whether a record has all tensors of a matrix within its bytes, each as long as its format has it.

    Args:
        record: of an expert.
        name: of the matrix.
        spec: its format.
        shape: [N, K].
    """
    if spec.kind == "ggml" and shape[1] % spec.group_size:
        return False
    tensors = {tensor.name: tensor for tensor in record.tensors}
    wanted = {part: DTYPE_BYTES[dtype] * math.prod(sizes) for part, dtype, sizes in spec.tensors(name, shape)}
    bias = tensors.get(f"{name}_bias")
    if bias is not None:
        wanted[bias.name] = DTYPE_BYTES[bias.dtype] * shape[0]
    found = [tensors[part] for part in wanted if part in tensors]
    return len(found) == len(wanted) and all(
        tensor.num_bytes == wanted[tensor.name] and 0 <= tensor.offset <= record.num_bytes - tensor.num_bytes
        for tensor in found
    )
