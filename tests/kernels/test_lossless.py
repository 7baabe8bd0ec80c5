"""The lossless format: each bfloat16 value comes back, from oracle and library, in matrices and in products."""

import pytest
import torch

from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.lossless import count_escapes, decode, encode, lossless_linear, lossless_rows
from moeflow.kernels.cpu.ops import linear
from moeflow.kernels.quantization.formats import lossless_format
from moeflow.kernels.quantization.lossless import decode_lossless, encode_lossless

needs_library = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")


def _stored(weight):
    spec = lossless_format(count_escapes(weight))
    (_, _, size), *_ = spec.tensors("", weight.shape)
    parts = torch.empty(size, dtype=torch.uint8), torch.empty(len(weight), dtype=torch.uint16)
    parts = (*parts, torch.empty(5 * spec.num_escapes, dtype=torch.uint8))
    encode(weight, *parts)
    return parts


def _weight(num_rows=45, in_features=190):
    weight = torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3, 7], weight[44, 189], weight[44, 0] = 0.0, 1e-30, -1e30
    return weight


def test_all_values_come_back_from_every_place_of_a_block():
    values = torch.arange(1 << 16).to(torch.uint16).view(torch.int16)
    for place in range(64):
        weight = values.roll(place).view(1024, 64).view(torch.bfloat16)
        parts = _stored(weight)
        out = torch.empty_like(weight)
        decode(*parts, (1024, 64), out)
        assert torch.equal(out.view(torch.int16), weight.view(torch.int16)), place


@needs_library
def test_the_library_writes_and_reads_as_the_oracle_does():
    weight = _weight()
    parts, expected = _stored(weight), encode_lossless(weight)
    for part, wanted in zip(parts, expected, strict=True):
        assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(decode_lossless(*parts, lossless_format(len(parts[2]) // 5), (45, 190)), weight)


@needs_library
def test_a_product_and_rows_have_the_bits_of_bfloat16():
    weight, bias = _weight(), torch.randn(45).bfloat16()
    parts = _stored(weight)
    for num_tokens in (1, 2, 16, 40):
        x = torch.randn(num_tokens, 190).bfloat16()
        assert torch.equal(lossless_linear(x, *parts, bias), linear(x, weight, bias))
    ids = torch.tensor([[44, 3], [0, 44]])
    assert torch.equal(lossless_rows(ids, *parts, 190), weight[ids])


@needs_library
def test_tensors_that_do_not_fit_are_not_multiplied():
    codes, tops, escapes = _stored(_weight())
    x = torch.randn(1, 190).bfloat16()
    assert lossless_linear(x.float(), codes, tops, escapes, None) is None
    assert lossless_linear(x[:, :100], codes, tops, escapes, None) is None
    assert lossless_linear(x, codes[:40], tops, escapes, None) is None
    assert lossless_linear(x, codes, tops, escapes[1:], None) is None
    assert lossless_linear(x, codes, tops, escapes, torch.randn(44)) is None


def test_too_little_room_and_damaged_escapes_are_refused():
    weight = _weight()
    codes, tops, escapes = _stored(weight)
    with pytest.raises(ConfigError, match="room for"):
        encode(weight, codes, tops, escapes[5:].clone())
    codes, tops, escapes = _stored(weight)
    escapes[0] += 1
    with pytest.raises(CheckpointError, match="damaged"):
        decode(codes, tops, escapes, (45, 190), None)
