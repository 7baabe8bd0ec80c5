"""NaN and infinity found by bit patterns: the same that torch finds, in every dtype and every weight format."""

import numpy as np
import pytest
import torch

from moeflow.core import MatrixSpec, RecordLayout
from moeflow.doctor.model.packed import bad_matrices
from moeflow.doctor.model.values import Bad, bad_values
from moeflow.dtypes import TORCH_DTYPES, tensors_of
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.quantization.quantize import quantize

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
SHAPE = (64, 128)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_values_are_found_as_by_torch(dtype):
    raw = np.random.default_rng(0).integers(0, 256, 1 << 19, dtype=np.uint8)
    raw[: 1 << 12] = 0xFF  # of most dtypes NaN
    values = torch.from_numpy(raw).view(FLOATS[dtype]).float()
    nan, infinite = bad_values(raw, dtype)
    assert nan.tolist() == values.isnan().nonzero().flatten().tolist()
    if dtype != "F64":  # as float32 the largest numbers are infinite
        assert infinite.tolist() == values.isinf().nonzero().flatten().tolist()
    assert len(nan)


def test_integers_are_never_bad():
    raw = np.full(64, 0xFF, np.uint8)
    assert [len(places) for dtype in ("U8", "I64", "BOOL") for places in bad_values(raw, dtype)] == [0] * 6


def record_of(spec, tensors):
    """Return a record of one matrix "w", and its bytes."""
    matrices = () if spec.kind == "float" else (MatrixSpec("w", spec.name, SHAPE),)
    record = RecordLayout.pack(spec.tensors("w", SHAPE), matrices)
    raw = np.zeros(record.num_bytes, np.uint8)
    for name, part in tensors_of(torch.from_numpy(raw), record).items():
        part.copy_(tensors[name].view(part.dtype).view(part.shape))
    return record, raw


def stored(name, values):
    return {key.replace("weight", "w", 1): part for key, part in quantize(values, FORMATS[name]).items()}


@pytest.mark.parametrize(("name", "part"), [("float32", "w"), ("bfloat16", "w"), ("int8", "w_scale"),
                                            ("int4-g64", "w_scale"), ("int4-g64", "w_zero")])  # fmt: skip
def test_bad_numbers_of_a_record_are_named(name, part):
    record, raw = record_of(FORMATS[name], stored(name, torch.randn(SHAPE)))
    assert list(bad_matrices(raw, record)) == []
    tensor = tensors_of(torch.from_numpy(raw), record)[part]
    tensor.view(-1)[-1], tensor.view(-1)[0] = torch.nan, -torch.inf
    assert list(bad_matrices(raw, record)) == [(part, Bad(1, 1))]


def test_codes_and_scales_that_are_no_numbers_are_named():
    for name, part, code in (("fp8", "w", 0xFF), ("mxfp4", "w_scale", 0xFF)):
        spec = FORMATS[name]
        tensors = {key: torch.full(size, 1, dtype=TORCH_DTYPES[kind]) for key, kind, size in spec.tensors("w", SHAPE)}
        record, raw = record_of(spec, tensors)
        assert list(bad_matrices(raw, record)) == []
        tensors_of(torch.from_numpy(raw), record)[part].view(-1)[3] = code
        assert list(bad_matrices(raw, record)) == [(part, Bad(1, 0))]


def test_lossless_matrices_are_looked_at_as_values():
    values = torch.randn(SHAPE).bfloat16()
    values[3, 7], values[60, 1], values[60, 2] = torch.nan, torch.inf, -torch.inf
    parts = encode_lossless(values)
    spec = lossless_format(parts[2].numel() // 5)
    record, raw = record_of(spec, dict(zip(("w", "w_top", "w_escapes"), parts, strict=True)))
    assert dequantize(tensors_of(torch.from_numpy(raw), record), "w", spec, SHAPE, torch.bfloat16)[3, 7].isnan()
    assert list(bad_matrices(raw, record)) == [("w", Bad(1, 2))]
