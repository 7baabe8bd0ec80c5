"""What the Triton kernels must do, against plain float64 arithmetic on dequantised weights.

Collected by `test_triton_kernels.py`, which runs this file in a process of its own: on the GPU where there is one, else
on CPU tensors under Triton's interpreter, whose switch must be set before anybody imports Triton.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.triton_blocks import (  # noqa: F401 - claims too
    test_a_token_has_the_same_bits_alone_among_others_in_pairs_and_looked_up,
    test_experts_in_blocks_are_those_of_their_values,
    test_infinite_and_missing_scales_stay_in_their_expert,
    test_long_rows_in_blocks_are_summed_in_several_steps,
    test_matrices_of_an_expert_may_have_different_types,
    test_types_without_a_kernel_are_declined,
    test_values_of_any_bytes_have_the_bits_of_their_type,
)
from helpers.triton_experts import DEVICE, SILU, Experts, decode, error, group, locate, prefill, routed
from helpers.triton_segments import test_records_may_lie_in_any_allocations  # noqa: F401 - a claim too
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.errors import ConfigError
from moeflow.kernels.activations import Activation
from moeflow.kernels.quantization.formats import FORMATS, lossless_format
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.kernels.triton import matrix
from moeflow.kernels.triton.experts import TritonExperts, available

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
QUANTISED = [name for name, spec in FORMATS.items() if spec.kind not in ("float", "ggml")]
FLOATS = ["float32", "bfloat16", "float16"]

assert available(), "neither a GPU nor TRITON_INTERPRET=1"
if DEVICE == "cpu":  # the interpreter is paid by the program: give each more rows, and leave the order of sums as it is
    for table in (matrix._DECODE_BLOCKS, matrix._DOWN_BLOCKS):
        table.update({key: (64, blocks) for key, (_, blocks) in table.items()})


@pytest.mark.parametrize("name", [
    *FLOATS, "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "int3-g64", "int2-g64", "int1-g64", "mxfp4",
    "fp8",
])  # fmt: skip
def test_every_format_equals_its_dequantised_weights(name):
    experts = Experts(name, 60, 40)
    for run, dtype in ((decode, torch.float32), (prefill, torch.float32), (prefill, torch.bfloat16)):
        routes = routed(experts, 2, 2, dtype)
        assert error(run(experts, *routes), experts.expected_sum(*routes)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["float32", "int4-g64", "int8"])
def test_long_rows_are_summed_in_several_steps(name):
    experts = Experts(name, 1100, 16)
    routes = routed(experts, 1, 2, torch.float32)
    assert error(decode(experts, *routes), experts.expected_sum(*routes)) < 1e-5


@pytest.mark.parametrize("run", [decode, prefill])
@pytest.mark.parametrize(
    "activation",
    [
        Activation("silu", "interleaved"),
        Activation("gelu", "concatenated"),
        Activation("gelu_tanh", "concatenated"),
        Activation("relu2", "none"),
        Activation("relu", "none"),
        Activation("swiglu_oai", "interleaved", 1.702, 1.5),
        Activation("silu_limited", "concatenated", limit=0.5),
        Activation("silu_capped", "concatenated", limit=0.5),
    ],
    ids=lambda activation: f"{activation.kind}-{activation.gate}",
)
def test_every_activation_with_biases(activation, run):
    experts = Experts("int4-g32", 64, 40, activation=activation, bias=True)
    routes = routed(experts, 2, 2, torch.float32)
    assert error(run(experts, *routes), experts.expected_sum(*routes)) < 1e-5


@pytest.mark.parametrize("run", [decode, prefill])
@pytest.mark.parametrize("gate", ["concatenated", "interleaved"])
def test_float_matrices_stored_transposed(run, gate):
    experts = Experts("bfloat16", 40, 48, activation=SILU._replace(gate=gate), bias=True, transposed=True)
    for dtype in (torch.float32, torch.float16):
        routes = routed(experts, 2, 2, dtype)
        assert error(run(experts, *routes), experts.expected_sum(*routes)) < TOLERANCE[dtype]


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    formats=st.tuples(st.sampled_from(FLOATS + QUANTISED), st.sampled_from(FLOATS + QUANTISED)),
    width=st.integers(1, 150),
    inner=st.integers(1, 100),
    num_tokens=st.integers(0, 4),
    top_k=st.integers(1, 3),
    gate=st.sampled_from(["none", "concatenated", "interleaved"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_equals_the_oracle(formats, width, inner, num_tokens, top_k, gate, bias, dtype):
    experts = Experts(formats[0], width, inner, down_format=formats[1], activation=Activation("gelu", gate), bias=bias)
    routes = routed(experts, num_tokens, top_k, dtype, seed=width)
    if num_tokens == 0:
        assert decode(experts, *routes).shape == prefill(experts, *routes).shape == (0, width)
        return
    expected = experts.expected_sum(*routes)
    assert error(decode(experts, *routes), expected) < TOLERANCE[dtype]
    assert error(prefill(experts, *routes), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["int4-g64", "bfloat16"])
def test_decode_is_pairs_and_combine_in_any_split_bit_for_bit(name):
    experts = Experts(name, 70, 72)
    hidden_states, slots, top_k_weights = routed(experts, 3, 3, torch.bfloat16)
    whole = decode(experts, hidden_states, slots, top_k_weights)
    tokens = torch.arange(3, dtype=torch.int32, device=DEVICE).repeat_interleave(3)
    outputs = torch.zeros(9, 70, device=DEVICE)
    for part in torch.randperm(9, generator=torch.Generator().manual_seed(1)).to(DEVICE).split(4):
        outputs[part] = experts.kernels.pairs(
            hidden_states, experts.arena, tokens[part], locate(experts.arena, slots.view(-1)[part])
        )
    assert torch.equal(experts.kernels.combine(outputs, top_k_weights, torch.bfloat16), whole)


@pytest.mark.parametrize("numbers_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", ["int4-g64", "bfloat16"])
def test_lookup_is_decode_bit_for_bit_and_tells_of_absent_experts(name, numbers_dtype):
    experts = Experts(name, 70, 72, bias=True)
    hidden_states, _, top_k_weights = routed(experts, 3, 3, torch.bfloat16)
    table = torch.tensor([9, -1, 3, 0, -1, 4, 1, 7], dtype=torch.int32, device=DEVICE)
    table = locate(experts.arena, table)[1:7]  # starts at 4 bytes
    slots = torch.tensor([[3, 0, -1], [1, 4, 3], [0, -1, 0]], dtype=torch.int32, device=DEVICE)
    for none, absent, told in ((6, False, 0), (2**31 - 1, False, 0), (-1, False, 0), (6, True, 1)):
        numbers = torch.tensor([[1, 2, none], [5, 4, 1], [2, none, 2]], dtype=numbers_dtype, device=DEVICE)
        if absent:
            numbers[2, 1] = 3
        missed = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        found = experts.kernels.lookup(hidden_states, experts.arena, numbers, table, missed, 2, top_k_weights)
        assert missed.tolist() == [0, 0, told, 0]
        assert torch.equal(found, decode(experts, hidden_states, slots, top_k_weights))


def test_prefill_is_the_same_bits_in_any_split_of_its_experts():
    experts = Experts("int3-g32", 64, 40)
    hidden_states, slots, _ = routed(experts, 20, 2, torch.bfloat16)
    present, tokens, offsets, places = group(slots)

    def run(begin, end, outputs):
        part = slice(offsets[begin], offsets[end])
        experts.kernels.prefill(
            hidden_states, experts.arena, locate(experts.arena, present[begin:end]), tokens[part],
            offsets[begin : end + 1] - offsets[begin], places[part], outputs,
        )  # fmt: skip
        return outputs

    whole = run(0, len(present), torch.zeros(40, 64, device=DEVICE))
    parts = torch.zeros(40, 64, device=DEVICE)
    for begin, end in ((4, len(present)), (0, 2), (2, 4)):
        run(begin, end, parts)
    assert torch.equal(parts, whole)


def test_prefill_serves_experts_of_several_tiles_and_none():
    experts = Experts("int8", 32, 32)
    hidden_states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    slots = torch.tensor([2, 0, 3], dtype=torch.int32, device=DEVICE)
    tokens = torch.arange(50, dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 37, 37, 50], dtype=torch.int32, device=DEVICE)
    outputs = torch.zeros(50, 32, device=DEVICE)
    locations = locate(experts.arena, slots)
    experts.kernels.prefill(hidden_states, experts.arena, locations, tokens, offsets, tokens.flip(0), outputs)
    expected = torch.cat((experts.expected(hidden_states[:37], 2), experts.expected(hidden_states[37:], 3)))
    assert error(outputs.flip(0), expected) < 1e-5


def test_slots_of_none_add_nothing():
    experts = Experts("int4-g64", 64, 40)
    hidden_states, slots, top_k_weights = routed(experts, 2, 2, torch.float32)
    none = torch.full_like(slots, -1)
    assert (decode(experts, hidden_states, none, top_k_weights) == 0).all()
    assert (prefill(experts, hidden_states, none, top_k_weights) == 0).all()


def shown_by(name, codes, scales, sign):
    """Return relu(sign * value) of each first code of 32 rows, as decode gives them."""
    experts = Experts(name, 32, 32, activation=Activation("relu", "none"), down_format="float32")
    values = {"up_proj": codes[:, None], "up_proj_scale": scales[:, None], "down_proj": torch.eye(32)}
    for tensor in experts.record.tensors:
        view = experts._view(experts.arena[0].cpu(), tensor)
        view.copy_(values[tensor.name].expand(view.shape))
        experts._view(experts.arena[0], tensor).copy_(view)
    one = torch.zeros(1, 32, device=DEVICE)
    one[0, 0] = sign
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    return decode(experts, one, slots, torch.ones(1, 1, device=DEVICE))[0].cpu()


def test_every_byte_of_fp8_has_its_value():
    codes = torch.arange(256).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    for part in codes.split(32):
        for sign in (1, -1):
            shown = shown_by("fp8", part, torch.ones(1), sign)
            assert torch.equal(shown, torch.relu(sign * part.view(torch.float8_e4m3fn).float()))
    assert shown_by("fp8", torch.full((32,), 0x7F, dtype=torch.uint8), torch.ones(1), 1).isnan().all()


def test_every_nibble_of_mxfp4_has_its_value():
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((magnitudes, -magnitudes)).repeat(2)
    codes = (torch.arange(32) % 16).to(torch.uint8)  # the first value of a byte is its low half
    for sign in (1, -1):
        shown = shown_by("mxfp4", codes | 0x70, torch.full((32,), 127, dtype=torch.uint8), sign)
        assert torch.equal(shown, torch.relu(sign * values))


def test_scales_of_mxfp4_reach_both_ends():
    powers = torch.arange(32).to(torch.uint8)
    powers[16:] += 254 - 31
    shown = shown_by("mxfp4", torch.full((32,), 2, dtype=torch.uint8), powers, 1)
    assert torch.equal(shown.double(), torch.exp2(powers.double() - 127))


def test_torch_compile_takes_the_calls_whole():
    experts = Experts("int4-g64", 32, 32)
    hidden_states, slots, top_k_weights = routed(experts, 2, 2, torch.float32)
    slots = locate(experts.arena, slots)
    groups = group(slots)
    tokens = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=DEVICE)

    def block(x):
        pairs = experts.kernels.pairs(x * 2, experts.arena, tokens, slots.view(-1))
        outputs = torch.zeros(4, 32, device=DEVICE)
        present, sources, offsets, places = groups
        experts.kernels.prefill(x * 2, experts.arena, present, sources, offsets, places, outputs)
        combined = experts.kernels.combine(outputs, top_k_weights, x.dtype)
        return experts.kernels.decode(x * 2, experts.arena, slots, top_k_weights), pairs, combined

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(hidden_states), block(hidden_states), strict=True):
        assert torch.equal(found, expected)


def test_fake_tensors_on_a_card_that_is_not_here_pass_every_call():
    kernels = Experts("int4-g64", 64, 40).kernels

    def on_card(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    with FakeTensorMode():
        x, outputs, weights = (on_card(*shape, dtype=torch.float32) for shape in ((20, 64), (40, 64), (20, 2)))
        arena, numbers = on_card(5, 1 << 16, dtype=torch.uint8), on_card(20, 2, dtype=torch.int64)
        for found in (
            kernels.lookup(x, arena, numbers, on_card(8), torch.empty(4, dtype=torch.int32), 3, weights),
            kernels.decode(x, arena, on_card(20, 2), weights),
            kernels.pairs(x, arena, on_card(20), on_card(20)),
            kernels.combine(outputs, weights, torch.float32),
        ):
            assert (found.shape, found.device.type) == ((20, 64), "cuda")
        kernels.prefill(x, arena, on_card(2), on_card(40), on_card(3), on_card(40), outputs)
        with pytest.raises(ConfigError, match="Give int32 on cuda:0"):
            kernels.decode(x, arena, numbers, weights)


def test_what_the_kernels_cannot_read_is_declined():
    assert TritonExperts.build(RecordLayout.pack([("gate_up_proj", "F64", (4, 2))]), SILU) is None
    assert TritonExperts.build(RecordLayout.pack([("down_proj", "F32", (2, 2))]), SILU) is None
    wide = [("gate_up_proj", "F32", (4, 2)), ("down_proj", "F32", (2, 2))]
    assert TritonExperts.build(RecordLayout.pack(wide), SILU) is not None
    assert TritonExperts.build(RecordLayout.pack([*wide, ("router", "F32", (2, 2))]), SILU) is None
    assert TritonExperts.build(RecordLayout.pack(wide), SILU._replace(kind="swish")) is None


def test_tensors_that_the_kernels_would_misread_are_refused():
    experts = Experts("float32", 60, 40)
    x, slots, weights = routed(experts, 3, 2, torch.float32)
    kernels, arena, flat, meta = experts.kernels, experts.arena, slots.flatten(), torch.device("meta")
    rows = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    offsets, outputs = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE), torch.zeros(6, 60, device=DEVICE)
    numbers, missed = slots.long(), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    wrong_lookups = [
        (numbers[:2], rows, missed, 0), (numbers.to(meta), rows, missed, 0), (numbers.short(), rows, missed, 0),
        (numbers, rows.long(), missed, 0), (numbers, slots, missed, 0), (numbers, rows, missed, 2),
        (numbers, rows, missed, -1), (numbers, rows, missed.long(), 0),
    ]  # fmt: skip
    right = (x, arena, slots[:1, 0], rows, offsets, rows, outputs)
    calls = [
        *(lambda x=wrong: kernels.decode(x, arena, slots, weights) for wrong in (x[:2], x[:, :59], x.double(), x[0])),
        *(lambda a=wrong: kernels.decode(x, a, slots, weights) for wrong in (arena[:, :64], arena.to(meta), arena[0])),
        *(lambda s=wrong: kernels.decode(x, arena, s, weights) for wrong in (slots.long(), slots[0], slots.to(meta))),
        *(lambda n=n, t=t, m=m, at=at: kernels.lookup(x, arena, n, t, m, at, weights) for n, t, m, at in wrong_lookups),
        *(lambda w=wrong: kernels.decode(x, arena, slots, w) for wrong in (weights[:2], weights.long(), weights[0])),
        *(lambda t=wrong: kernels.pairs(x, arena, t, flat) for wrong in (rows[:5], rows.long(), rows.to(meta))),
        *(lambda n=number: kernels.prefill(*right[:n], right[n].to(meta), *right[n + 1 :]) for number in range(7)),
        lambda: kernels.prefill(*right[:4], offsets[:1], rows, outputs),
        lambda: kernels.prefill(*right[:5], rows[:5], outputs),
        lambda: kernels.combine(outputs, weights[:2], torch.float32),
        lambda: kernels.combine(outputs.half(), weights, torch.float32),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"Give|Allowed"):
            call()
    prefill(experts, x, slots, weights)


@pytest.mark.parametrize(("width", "inner"), [(60, 40), (1100, 16), (130, 64)])
def test_lossless_records_give_the_bits_of_bfloat16(width, inner):
    plain = Experts("bfloat16", width, inner)
    matrices = {}
    for slot in plain.arena.cpu():
        for tensor in plain.record.tensors:
            weight = plain._view(slot, tensor)
            weight[1::7, ::5] *= 2.0**-40  # escapes in some rows, others have none
            weight[1, -1], weight[1, 0] = 0.0, -0.0
            matrices.setdefault(tensor.name, []).append(weight)
    if DEVICE != "cpu":
        for slot, number in zip(plain.arena, range(len(plain.arena)), strict=True):
            for tensor in plain.record.tensors:
                plain._view(slot, tensor).copy_(matrices[tensor.name][number])
    specs = {
        name: lossless_format(max(encode_lossless(weight)[2].numel() // 5 for weight in weights) + 3)
        for name, weights in matrices.items()
    }
    tensors = [part for name, spec in specs.items() for part in spec.tensors(name, plain.shapes[name])]
    described = tuple(MatrixSpec(name, spec.name, plain.shapes[name]) for name, spec in specs.items())
    record = RecordLayout.pack(tensors, described)
    arena = torch.full((len(plain.arena), record.num_bytes), 255, dtype=torch.uint8)
    offsets = {tensor.name: tensor for tensor in record.tensors}
    for name, weights in matrices.items():
        for slot, weight in zip(arena, weights, strict=True):
            parts = encode_lossless(weight, specs[name].num_escapes)
            for part, stored in zip(("", "_top", "_escapes"), parts, strict=True):
                at = offsets[name + part]
                slot[at.offset : at.offset + at.num_bytes] = stored.contiguous().view(torch.uint8).flatten()
    kernels = TritonExperts.build(record, SILU)
    assert kernels is not None
    lossless = SimpleNamespace(kernels=kernels, arena=arena.to(DEVICE))
    for run, dtype in ((decode, torch.float32), (prefill, torch.float32), (prefill, torch.bfloat16)):
        routes = routed(plain, 3, 2, dtype)
        assert torch.equal(run(lossless, *routes), run(plain, *routes))
