"""Weights that a checkpoint holds quantised already: the methods that are read, and the tensors of each matrix.

A quantised matrix [N, K] is stored in pieces of its own names:

| method | pieces, [shape] and dtype | the matrix they stand for |
|---|---|---|
| mxfp4 | X_blocks [.., N, K / 32, 16] uint8, X_scales [.., N, K / 32] uint8 | X |
| fp8 | X [.., N, K] E4M3, X_scale_inv [.., ceil(N / 128), ceil(K / 128)] float | X |
| gptq | X.qweight [K / 8, N], X.qzeros [groups, N / 8], X.g_idx [K] int32, X.scales [groups, N] float16 | X.weight |
| awq | X.qweight [K, N / 8], X.qzeros [groups, N / 8] int32, X.scales [groups, N] float16 | X.weight |

(`..` is the expert where experts are stacked; a GPTQ matrix may lack g_idx.)

Knows headers and config.json. Knows nothing of torch, models or transformers.
"""

from typing import Any, NamedTuple

from moeflow.checkpoint.headers import TensorEntry
from moeflow.errors import CheckpointError, UnsupportedModelError

BLOCK = 128  # rows and columns that share an fp8 scale
_CODES_PER_INT32 = 8  # of 4 bits
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_GPTQ_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # version 1 stores each zero point less one


class QuantizationScheme(NamedTuple):
    """The quantisation of a checkpoint.

    Args:
        method: "mxfp4", "fp8", "gptq" or "awq".
        group_size: neighbours of a row that share a scale in gptq and awq, -1 for a whole row; else 0.
        zero_offset: added to each stored zero point.
        symmetric: every zero point is 8. Some tools store it as it is where `zero_offset` says otherwise.
    """

    method: str
    group_size: int = 0
    zero_offset: int = 0
    symmetric: bool = False

    @property
    def codes(self) -> str:
        """Ending of the name of the tensor with the codes."""
        return {"mxfp4": "_blocks", "fp8": ""}.get(self.method, ".qweight")

    @property
    def stands_for(self) -> str:
        """Ending of a matrix's name in place of `codes`."""
        return ".weight" if self.method in ("gptq", "awq") else ""

    @property
    def companions(self) -> tuple[str, ...]:
        """Endings of the names of a matrix's other tensors."""
        known = {"mxfp4": ("_scales",), "fp8": ("_scale_inv",), "gptq": (".qzeros", ".scales", ".g_idx")}
        return known.get(self.method, (".qzeros", ".scales"))

    @property
    def format(self) -> str:
        """Name of the weight format that takes the codes as they are."""
        return f"int4-g{self.stored_group_size}" if self.method in ("gptq", "awq") else self.method

    @property
    def stored_group_size(self) -> int:
        """The largest group size of a weight format that divides the checkpoint's."""
        if self.group_size == -1:
            return 128
        return next(size for size in (128, 64, 32) if self.group_size % size == 0)


class StoredMatrix(NamedTuple):
    """One quantised matrix of a checkpoint, or one for each expert.

    Args:
        pieces: {ending of the tensor's name: (its name, entry)}; the codes come first.
        shape: [N, K], or [E, N, K].
    """

    pieces: dict[str, tuple[str, TensorEntry]]
    shape: tuple[int, ...]


def read_scheme(quantization: dict, source: str) -> QuantizationScheme:
    """Read a config's `quantization_config`.

    Args:
        quantization: as config.json has it.
        source: of the config, for errors.

    Raises:
        UnsupportedModelError: another method, or a variant of one that is not read.
    """
    method = str(quantization.get("quant_method"))
    method = "awq" if method == "gptq" and _awq_layout(quantization) else method
    if method == "mxfp4":
        return QuantizationScheme(method)
    if method == "fp8":
        block = list(quantization.get("weight_block_size", [BLOCK, BLOCK]) or [])
        _allow(source, method, "weight_block_size", block, [[BLOCK, BLOCK]])
        _allow(source, method, "activation_scheme", quantization.get("activation_scheme", "dynamic"), ["dynamic"])
        _allow(source, method, "fmt", quantization.get("fmt", "e4m3"), ["e4m3"])
        return QuantizationScheme(method)
    if method not in ("gptq", "awq"):
        raise UnsupportedModelError(
            f"{source} is quantised with {method}, which this version does not read. Allowed: mxfp4, fp8, gptq and awq "
            "(both of 4 bits). Use the model's float32, bfloat16 or float16 checkpoint."
        )
    _allow(source, method, "bits", quantization.get("bits", quantization.get("w_bit")), [4])
    group_size = quantization.get("group_size", quantization.get("q_group_size", 128))
    if type(group_size) is not int or (group_size != -1 and (group_size < 32 or group_size % 32)):
        raise _refusal(source, method, "group_size", group_size, "-1 and multiples of 32")
    if method == "awq":
        version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
        _allow(source, method, "version", version, ["gemm"])
        _allow(source, method, "zero_point", quantization.get("zero_point", True), [True])
        return QuantizationScheme(method, group_size)
    layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    _allow(source, method, "checkpoint_format", layout, list(_GPTQ_ZERO_OFFSETS))
    _allow(source, method, "desc_act", bool(quantization.get("desc_act", False)), [False])
    exceptions = [rule for rule in quantization.get("dynamic") or {} if not rule.startswith("-:")]
    _allow(source, method, "dynamic", exceptions, [[]])
    return QuantizationScheme(method, group_size, _GPTQ_ZERO_OFFSETS[layout], quantization.get("sym") is True)


def _awq_layout(quantization: dict) -> bool:
    return str(quantization.get("checkpoint_format") or quantization.get("format")).lower() == "gemm"


def _allow(source: str, method: str, name: str, found: Any, allowed: list) -> None:
    if found not in allowed:
        raise _refusal(source, method, name, found, " or ".join(str(value) for value in allowed))


def _refusal(source: str, method: str, name: str, found: Any, allowed: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} is quantised with {method} and {name}={found!r}, which this version does not read. Allowed: "
        f"{allowed}. Use another quantisation of the model, or its float32, bfloat16 or float16 checkpoint."
    )


def find_matrices(tensors: dict[str, TensorEntry], scheme: QuantizationScheme) -> dict[str, StoredMatrix]:
    """Find the quantised matrices of a checkpoint and check their pieces against each other.

    Args:
        tensors: the checkpoint's tensors by name.
        scheme: how they are quantised.

    Returns:
        {name of the matrix: its pieces}.

    Raises:
        CheckpointError: a piece is missing, or does not fit the others; the message names it.
    """
    found = {}
    for key, entry in tensors.items():
        if scheme.method == "fp8":
            if key.endswith("_scale_inv") and key.removesuffix("_scale_inv") not in tensors:
                raise _lacks(key.removesuffix("_scale_inv"), key)
            if not entry.dtype.startswith("F8_E4M3") and f"{key}_scale_inv" not in tensors:
                continue
        elif scheme.method != "mxfp4" and key.endswith(".qzeros"):
            codes = key.removesuffix(".qzeros") + scheme.codes
            if codes not in tensors:
                raise _lacks(codes, key)
            continue
        elif not key.endswith(scheme.codes):
            continue
        stem = key.removesuffix(scheme.codes)
        pieces = {scheme.codes: (key, entry)}
        for ending in scheme.companions:
            if f"{stem}{ending}" in tensors:
                pieces[ending] = (f"{stem}{ending}", tensors[f"{stem}{ending}"])
            elif ending != ".g_idx":
                raise _lacks(f"{stem}{ending}", key)
        found[stem + scheme.stands_for] = StoredMatrix(pieces, _shape(pieces, scheme))
    return found


def stand_ins(tensors: dict[str, TensorEntry], matrices: dict[str, StoredMatrix]) -> dict[str, TensorEntry]:
    """Return a checkpoint's tensors with one entry, under the matrix's name, for all pieces of each matrix."""
    pieces = {name for matrix in matrices.values() for name, _ in matrix.pieces.values()}
    seen = {key: entry for key, entry in tensors.items() if key not in pieces}
    return seen | {name: next(iter(matrix.pieces.values()))[1] for name, matrix in matrices.items()}


def _lacks(name: str, beside: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint has {beside} and lacks {name}, which belongs to it. The checkpoint is incomplete: "
        "download it again."
    )


def _shape(pieces: dict[str, tuple[str, TensorEntry]], scheme: QuantizationScheme) -> tuple[int, ...]:
    """Return the matrix's shape, from its codes, after a check of every piece."""
    _, codes = pieces[scheme.codes]
    if scheme.method == "mxfp4":
        _check(pieces[scheme.codes], ("U8",), (*codes.shape[:-1], 16) if len(codes.shape) == 4 else None)
        _check(pieces["_scales"], ("U8", "F8_E8M0"), codes.shape[:-1])
        return (*codes.shape[:2], codes.shape[2] * 32)
    if scheme.method == "fp8":
        _check(pieces[scheme.codes], ("F8_E4M3",), codes.shape if len(codes.shape) in (2, 3) else None)
        *stack, rows, columns = codes.shape
        _check(pieces["_scale_inv"], _SCALE_DTYPES, (*stack, -(-rows // BLOCK), -(-columns // BLOCK)))
        return codes.shape
    _check(pieces[scheme.codes], ("I32",), codes.shape if len(codes.shape) == 2 else None)
    if scheme.method == "gptq":
        columns, rows = codes.shape[0] * _CODES_PER_INT32, codes.shape[1]
    else:
        columns, rows = codes.shape[0], codes.shape[1] * _CODES_PER_INT32
    groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
    _check(pieces[".scales"], ("F16",), (groups, rows))
    _check(pieces[".qzeros"], ("I32",), (groups, rows // _CODES_PER_INT32))
    if ".g_idx" in pieces:
        _check(pieces[".g_idx"], ("I32",), (columns,))
    return rows, columns


def _check(piece: tuple[str, TensorEntry], dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
    key, entry = piece
    if entry.dtype not in dtypes or entry.shape != shape:
        wanted = f"of shape {list(shape)}" if shape is not None else "of that many dimensions"
        raise CheckpointError(
            f"{key} is {entry.dtype} {list(entry.shape)}; its quantisation needs {' or '.join(dtypes)} {wanted}. "
            "The checkpoint's config.json is of another model, or it is damaged: download it again."
        )
