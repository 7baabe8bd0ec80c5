"""Codes lie where the table of `kernels/quantization/formats.py` says, byte by byte, and are worth what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.errors import ConfigError
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, find_format, lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.quantization.packing import pack_codes, unpack_codes

BITS = (1, 2, 3, 4, 8)
INTEGERS = [name for name, spec in FORMATS.items() if spec.kind in ("int", "uint", "sign")]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def read_code(row: list[int], bits: int, k: int) -> int:
    """Read one code by the table, from the bytes of a row."""
    block = row[k // 32 * 4 * bits :][: 4 * bits]
    i = k % 32
    if bits == 8:
        return block[i]
    if bits == 4:
        return block[i % 16] >> 4 * (i // 16) & 15
    if bits == 2:
        return block[i % 8] >> 2 * (i // 8) & 3
    if bits == 3:
        return (block[i % 8] >> 2 * (i // 8) & 3) | (block[8 + i // 8] >> i % 8 & 1) << 2
    return int.from_bytes(bytes(block), "little") >> i & 1


def random_tensors(spec, shape, seed):
    """Stored tensors of random content."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, dtype, size in spec.tensors("w", shape):
        if dtype == "U8":
            made[name] = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        else:
            made[name] = torch.randn(size, generator=generator).to({"F16": torch.half, "F32": torch.float32}[dtype])
    return made


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(num_rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 999))
def test_packed_codes_lie_where_the_table_says_and_come_back(bits, num_rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (num_rows, 32 * blocks), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (num_rows, blocks * 4 * bits)
    assert torch.equal(unpack_codes(packed, bits), codes)
    rows = packed.tolist()
    for n in range(num_rows):
        assert [read_code(rows[n], bits, k) for k in range(32 * blocks)] == codes[n].tolist()


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [255, 1, *[0] * 30], "ff01" + "00" * 30),
        (4, [*range(16), *range(16)], "".join(f"{i:x}{i:x}" for i in range(16))),
        (4, [1, *[0] * 15, 2, *[0] * 15], "21" + "00" * 15),
        (3, [7, *[0] * 31], "03" + "00" * 7 + "01000000"),
        (3, [*[0] * 31, 6], "00" * 7 + "80" + "00000080"),
        (2, [1, *[0] * 7, 2, *[0] * 7, 3, *[0] * 15], "39" + "00" * 7),
        (2, [*[0] * 31, 3], "00" * 7 + "c0"),
        (1, [1, *[0] * 8, 1, *[0] * 21, 1], "01020080"),
    ],
)
def test_bytes_of_a_block(bits, codes, expected):
    assert pack_codes(torch.tensor([codes], dtype=torch.uint8), bits).numpy().tobytes().hex() == expected


@pytest.mark.parametrize("name", INTEGERS)
@settings(max_examples=8, deadline=None)
@given(num_rows=st.integers(1, 4), in_features=st.integers(1, 150), seed=st.integers(0, 999))
def test_integer_formats_are_worth_what_the_table_says(name, num_rows, in_features, seed):
    spec = FORMATS[name]
    tensors = random_tensors(spec, (num_rows, in_features), seed)
    values = dequantize(tensors, "w", spec, (num_rows, in_features), torch.float64)
    rows, scale = tensors["w"].tolist(), tensors["w_scale"].tolist()
    for n in range(num_rows):
        for k in range(in_features):
            code, group = read_code(rows[n], spec.bits, k), k // spec.group_size if spec.group_size else 0
            if spec.kind == "int":
                number = code - 256 if code > 127 else code
            elif spec.kind == "uint":
                number = code - tensors["w_zero"][n, group].item()
            else:
                number = 2 * code - 1
            assert values[n, k].item() == number * scale[n][group]  # exact in float64


@settings(max_examples=10, deadline=None)
@given(num_rows=st.integers(1, 4), in_features=st.integers(1, 100), seed=st.integers(0, 999))
def test_mxfp4_is_e2m1_times_a_power_of_two(num_rows, in_features, seed):
    spec = FORMATS["mxfp4"]
    tensors = random_tensors(spec, (num_rows, in_features), seed)
    tensors["w_scale"].clamp_(max=254)
    values = dequantize(tensors, "w", spec, (num_rows, in_features), torch.float64)
    for n in range(num_rows):
        for k in range(in_features):
            code = tensors["w"][n, k // 2].item() >> 4 * (k % 2) & 15
            power = 2.0 ** (tensors["w_scale"][n, k // 32].item() - 127)
            assert values[n, k].item() == (-1) ** (code >> 3) * E2M1[code & 7] * power


def test_mxfp4_scale_byte_255_is_nan():
    tensors = {"w": torch.full((1, 16), 0x22, dtype=torch.uint8), "w_scale": torch.tensor([[255]], dtype=torch.uint8)}
    assert dequantize(tensors, "w", FORMATS["mxfp4"], (1, 32)).isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (130, 70), (128, 128), (257, 300)])
def test_fp8_is_e4m3_times_the_scale_of_its_block(shape):
    spec = FORMATS["fp8"]
    tensors = random_tensors(spec, shape, 3)
    tensors["w"][(tensors["w"] & 127) == 127] = 0  # NaN
    values = dequantize(tensors, "w", spec, shape, torch.float64)
    assert values.shape == shape
    for n in {0, shape[0] // 2, shape[0] - 1}:
        for k in {0, shape[1] // 2, shape[1] - 1}:
            byte = tensors["w"][n, k].item()
            exponent, mantissa = byte >> 3 & 15, byte & 7
            magnitude = (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            scale = tensors["w_scale"][n // 128, k // 128].double().item()
            assert values[n, k].item() == (-1) ** (byte >> 7) * magnitude * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float_formats_are_a_cast(dtype):
    weight = torch.randn(3, 5).bfloat16()
    found = dequantize({"w": weight}, "w", FORMATS["bfloat16"], (3, 5), dtype)
    assert found.dtype == dtype
    assert torch.equal(found.bfloat16(), weight)


@pytest.mark.parametrize("name", INTEGERS)
def test_float32_values_are_the_exact_ones_rounded(name):
    spec = FORMATS[name]
    tensors = random_tensors(spec, (3, 100), 1)
    exact = dequantize(tensors, "w", spec, (3, 100), torch.float64)
    torch.testing.assert_close(dequantize(tensors, "w", spec, (3, 100)).double(), exact, rtol=3e-7, atol=1e-7)


def test_a_format_without_its_group_has_groups_of_64():
    assert find_format("int3") is FORMATS["int3-g64"]
    assert find_format("int8") is FORMATS["int8"]  # is a format by itself: a scale a row


def test_unknown_format_is_told_what_there_is():
    with pytest.raises(ConfigError, match=r"'int5' is not a weight format\. Allowed: .*int4-g64"):
        find_format("int5")


def test_a_lossless_matrix_is_decoded_where_its_codes_are():
    weight = (torch.arange(-70, 70).view(2, 70) * 1.0).bfloat16()
    weight[1, 3] *= 2.0**-40
    with torch.device("meta"):  # a tensor made anywhere else than with the codes would have no values
        codes, tops, escapes = encode_lossless(weight)
        tensors = {"up_proj": codes, "up_proj_top": tops, "up_proj_escapes": escapes}
        found = dequantize(tensors, "up_proj", lossless_format(len(escapes) // 5), (2, 70), torch.bfloat16)
    assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
