"""The lossless format: each bfloat16 value comes back, from oracle and library, in matrices and in products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.lossless_experts import any_bits
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.lossless import count_escapes, decode, encode, lossless_linear, lossless_rows
from moeflow.kernels.cpu.ops import linear
from moeflow.kernels.quantization.formats import find_format, holds_matrix, lossless_format
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
    weight[3, 7], weight[44, 189], weight[44, 0] = -1e-20, 1e-30, -1e30
    weight[3, 6], weight[9, 9], weight[10, 189] = 0.0, -0.0, 1e-39
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


def test_zeros_and_denormal_numbers_need_no_escape():
    weight = _weight()
    assert count_escapes(weight) == 3
    weight[7] = 0.0
    weight[8, 1:] = 1e-39
    assert count_escapes(weight) == 3
    parts = _stored(weight)
    out = torch.empty_like(weight)
    decode(*parts, (45, 190), out)
    assert torch.equal(out.view(torch.int16), weight.view(torch.int16))
    assert [row for row in range(45) if parts[1].view(torch.int16)[row] >= 256] == [3, 44]


def test_too_little_room_and_damaged_escapes_are_refused():
    weight = _weight()
    codes, tops, escapes = _stored(weight)
    with pytest.raises(ConfigError, match="room for"):
        encode(weight, codes, tops, escapes[5:].clone())
    codes, tops, escapes = _stored(weight)
    escapes[0] += 1
    with pytest.raises(CheckpointError, match="damaged"):
        decode(codes, tops, escapes, (45, 190), None)


def _bits(parts):
    return [part.view(torch.uint8).clone() for part in parts]


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from((0.0, 0.002, 0.07, 0.5, 1.0)),
    st.integers(0, 20),
    st.integers(0, 2**20),
)
def test_any_bits_of_any_shape_come_back_from_both(num_rows, in_features, spread, spare, seed):
    weight = any_bits((num_rows, in_features), seed, spread)
    wanted = weight.view(torch.int16)
    oracle = encode_lossless(weight, count_escapes(weight) + spare)
    spec = lossless_format(oracle[2].numel() // 5)
    assert [list(part.shape) for part in oracle] == [list(shape) for _, _, shape in spec.tensors("", weight.shape)]
    stored = [torch.full_like(part.view(torch.uint8), 0xA5).view(part.dtype) for part in oracle]
    encode(weight, *stored)
    assert all(map(torch.equal, _bits(stored), _bits(oracle)))
    assert torch.equal(decode_lossless(*stored, spec, weight.shape).view(torch.int16), wanted)
    out = torch.empty_like(weight)
    decode(*stored, tuple(weight.shape), out)
    assert torch.equal(out.view(torch.int16), wanted)


def _nibble(parts, row, column):
    """Return the index of a value's code byte, and how far up its half lies."""
    part, lane = column % 64 // 16, column % 16
    place = 16 * (lane // 4) + 8 * (part // 2) + 2 * (lane % 4) + part % 2
    return (row, column // 64 * 96 + 64 + place % 32), 4 * (place // 32)


def _set_code(parts, row, column, code):
    at, shift = _nibble(parts, row, column)
    parts[0][at] = int(parts[0][at]) & ~(15 << shift) & 255 | code << shift


def _set_position(parts, number, position):
    parts[2][4 * number : 4 * number + 4] = torch.tensor(list(position.to_bytes(4, "little")), dtype=torch.uint8)


def _change(part, at, value):
    def change(parts):
        parts[part].view(torch.int16 if part == 1 else torch.uint8)[at] = value

    return change


DAMAGE = {  # of `_weight`, with escapes at row 3 column 7 (0), row 44 columns 0 and 189, and room for two more
    "escapes that swap places": (lambda p: (_set_position(p, 0, 44 * 190), _set_position(p, 1, 577)), "out of order"),
    "an escape twice": (lambda p: _set_position(p, 1, 577), "out of order"),
    "an escape behind the matrix": (lambda p: _set_position(p, 2, 45 * 190), "out of order|outside"),
    "an escape far away": (lambda p: _set_position(p, 2, 2**32 - 2), "out of order|outside"),
    "an unused escape first": (lambda p: _set_position(p, 0, 2**32 - 1), "out of order|unused"),
    "an escape where no code asks for one": (lambda p: _set_position(p, 0, 578), "other values"),
    "an escape too many": (lambda p: _set_position(p, 3, 45 * 190 - 1), "out of order|other values"),
    "an escape of exponent 0": (lambda p: p[2].index_fill_(0, torch.tensor([4 * 5 + 1]), 0), "other values"),
    "a code in an escape's place": (lambda p: _set_code(p, 3, 7, 2), "other values|hide"),
    "a code in the last escape's place": (
        lambda p: _set_code(p, 44, 189, 2),
        "other values",
    ),
    "a row that hides its escapes": (_change(1, 44, 127), "hide"),
    "a row that has none": (_change(1, 5, 127 | 256), "hide"),
    "a top that is no exponent": (_change(1, 5, 127 | 512), "tops"),
    "codes that name no value": (_change(1, 5, 0), "codes that name no value"),
}


@pytest.mark.parametrize("reader", ["library", "oracle"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, reader):
    weight = _weight()
    parts = encode_lossless(weight, count_escapes(weight) + 2)
    assert parts[2].numel() == 5 * 5
    change, match = DAMAGE[name]
    change(parts)
    readers = {
        "library": lambda: decode(*parts, (45, 190), torch.empty_like(weight)),
        "oracle": lambda: decode_lossless(*parts, lossless_format(5), (45, 190)),
    }
    with pytest.raises(CheckpointError, match=f"a lossless matrix has.*({match}).*damaged"):
        readers[reader]()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from((1, 3, 50, 10**6)))
def test_library_and_oracle_agree_on_damaged_bytes(seed, most):
    weight = any_bits((6, 70), seed, 0.05)
    parts = encode_lossless(weight, count_escapes(weight) + 2)
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        flat = part.view(torch.uint8).flatten()
        for at in torch.randint(0, len(flat), (min(most, len(flat)),), generator=generator).tolist():
            flat[at] = int(torch.randint(0, 256, (), generator=generator))
    answers = []
    out = torch.empty_like(weight)
    for call in (
        lambda: decode(*parts, (6, 70), out) or out,
        lambda: decode_lossless(*parts, lossless_format(parts[2].numel() // 5), (6, 70)),
    ):
        try:
            answers.append(call().view(torch.int16))
        except CheckpointError:
            answers.append(None)
    assert (answers[0] is None) == (answers[1] is None)
    assert answers[0] is None or torch.equal(*answers)


def test_parts_of_another_dtype_or_size_are_refused():
    weight = _weight()
    codes, tops, escapes = _stored(weight)
    out = torch.empty_like(weight)
    for parts in (
        (codes[:, :-1].contiguous(), tops, escapes),
        (codes[:-1], tops, escapes),
        (codes.view(torch.int8), tops, escapes),
        (codes, tops[:-1], escapes),
        (codes, tops.view(torch.int16), escapes),
        (codes, tops, escapes[:-1]),
        (codes, tops, escapes.view(torch.int8)),
        (codes.T.contiguous().T, tops, escapes),
    ):
        with pytest.raises(ConfigError, match="45, 190"):
            decode(*parts, (45, 190), out)
    for wrong in (out.float(), out[:, :-1].contiguous(), out.T.contiguous().T):
        with pytest.raises(ConfigError, match="out "):
            decode(codes, tops, escapes, (45, 190), wrong)
    for wrong in (weight.float(), weight[0], weight[:0], weight.T, weight.to("meta")):
        with pytest.raises(ConfigError, match=r"\[N, K\] in bfloat16"):
            count_escapes(wrong)


def test_a_format_is_found_by_its_name_and_knows_its_sizes():
    spec = find_format("bf16-lossless-48")
    assert spec == lossless_format(48)
    assert (spec.kind, spec.bits, spec.num_escapes, spec.padded(65)) == ("lossless", 12, 48, 128)
    assert spec.tensors("w", (3, 65)) == [
        ("w", "U8", (3, 192)), ("w_top", "U16", (3,)), ("w_escapes", "U8", (240,))
    ]  # fmt: skip
    assert spec.num_bytes((3, 65)) == 3 * 192 + 3 * 2 + 240
    for name in ("bf16-lossless", "bf16-lossless-", "bf16-lossless-016", "bf16-lossless--1", "bf16-lossless-1.5"):
        with pytest.raises(ConfigError, match="is not a weight format"):
            find_format(name)


def test_a_record_holds_a_lossless_matrix_or_lacks_a_part():
    spec = lossless_format(2)
    record = RecordLayout.pack(spec.tensors("w", (3, 65)), (MatrixSpec("w", spec.name, (3, 65)),))
    assert holds_matrix(record, "w", spec, (3, 65))
    assert not holds_matrix(record, "w", lossless_format(3), (3, 65))
    assert not holds_matrix(record, "w", spec, (4, 65))
    assert not holds_matrix(record._replace(tensors=record.tensors[:-1]), "w", spec, (3, 65))
