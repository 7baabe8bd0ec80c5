"""What the Triton kernels must do with GGML's blocks; `triton_claims.py` takes it in."""

import pytest
import torch
import triton
import triton.language as tl

from helpers.ggml_blocks import BLOCKS
from helpers.triton_experts import DEVICE, SILU, Experts, decode, error, locate, prefill, routed
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.ggml_values import block_values
from moeflow.kernels.triton.block_values import load_blocks
from moeflow.kernels.triton.experts import TritonExperts
from moeflow.kernels.triton.matrix import BLOCK_FORMATS


@triton.jit
def _show(
    record, out, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    rows, blocks = tl.program_id(0) * 32 + tl.arange(0, 32), tl.arange(0, 16)
    values = load_blocks(record, rows, blocks, N, K, KIND, GROUP, BLOCK_BYTES, 64)
    columns = (blocks * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
    tl.store(out + rows[:, None, None] * 512 + columns, values)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_values_of_any_bytes_have_the_bits_of_their_type(name):
    """Scales of every size, infinite and missing ones among them; zeros where no row or column is."""
    spec, num_rows, width = find_format(name), 300, 512 - max(find_format(name).group_size, 64)
    size, generator = spec.tensors("", (num_rows, width))[0][2], torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    record = torch.full((64 + stored.numel() + 4096,), 255, dtype=torch.uint8)
    record[64 : 64 + stored.numel()] = stored.flatten()
    out = torch.full((320, 512), 1.5, device=DEVICE)
    _show[(10,)](record.to(DEVICE), out, num_rows, width, name, spec.group_size, spec.block_bytes)
    found, expected = out.cpu(), block_values(stored, name)
    assert expected.isnan().any() or name == "ggml_mxfp4"
    is_nan = expected.isnan()
    assert torch.equal(found[:num_rows, :width].isnan(), is_nan)
    bits = found[:num_rows, :width].masked_fill(is_nan, 0).contiguous().view(torch.int32)
    assert torch.equal(bits, expected.masked_fill(is_nan, 0).view(torch.int32))
    assert not found[num_rows:].any()
    assert not found[:, width:].any()


# Formats of both matrices, H and I: small ones, for the interpreter is slow.
FIRST, DOWN = ("q4_k", "q8_0", 256, 32), ("q8_0", "q6_k", 32, 256)


def of(first, down, width, inner, *, num_slots=2):
    return Experts(first, width, inner, down_format=down, num_slots=num_slots)


def as_values(experts):
    """Return the same experts in float32."""
    floats = Experts("float32", experts.kernels.plan.first.in_features, experts.inner, num_slots=len(experts.arena))
    for slot, weights in zip(floats.arena, experts.values, strict=True):
        for tensor in floats.record.tensors:
            floats._view(slot, tensor).copy_(weights[tensor.name])
    return floats


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_experts_in_blocks_are_those_of_their_values(name):
    experts = of(name, "q8_0", 256 if find_format(name).group_size == 256 else 64, 32)
    routes, rounded = routed(experts, 2, 2, torch.float32), routed(experts, 2, 2, torch.bfloat16)
    assert error(decode(experts, *routes), experts.expected_sum(*routes)) < 1e-5
    assert error(prefill(experts, *rounded), experts.expected_sum(*rounded)) < 1e-2
    if DEVICE == "cpu":  # on a card sums of another format may lie in threads otherwise
        assert torch.equal(decode(experts, *routes), decode(as_values(experts), *routes))


@pytest.mark.parametrize(("first", "down", "width"), [("q4_k", "q6_k", 256), ("float32", "q5_k", 32)])
def test_matrices_of_an_expert_may_have_different_types(first, down, width):
    experts = of(first, down, width, 256)
    for run, dtype, bound in ((decode, torch.float32, 1e-5), (prefill, torch.bfloat16, 1e-2)):
        routes = routed(experts, 2, 1, dtype)
        assert error(run(experts, *routes), experts.expected_sum(*routes)) < bound


@pytest.mark.parametrize(("name", "width"), [("q4_k", 1280), ("q6_k", 768), ("q8_0", 1120)])
def test_long_rows_in_blocks_are_summed_in_several_steps(name, width):
    experts = of(name, "float32", width, 32)
    routes = routed(experts, 1, 2, torch.float32)
    assert error(decode(experts, *routes), experts.expected_sum(*routes)) < 1e-5


@pytest.mark.parametrize(("parts", "num_tokens", "top_k"), [(FIRST, 16, 1), (DOWN, 3, 2)])
def test_a_token_has_the_same_bits_alone_among_others_in_pairs_and_looked_up(parts, num_tokens, top_k):
    experts = of(*parts, num_slots=3)
    hidden_states, slots, top_k_weights = routed(experts, num_tokens, top_k, torch.bfloat16)
    whole = decode(experts, hidden_states, slots, top_k_weights)
    for part in (slice(0, 1), slice(1, 3)):
        assert torch.equal(decode(experts, hidden_states[part], slots[part], top_k_weights[part]), whole[part])
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE).repeat_interleave(top_k)
    outputs = experts.kernels.pairs(hidden_states, experts.arena, tokens, locate(experts.arena, slots.view(-1)))
    assert torch.equal(experts.kernels.combine(outputs, top_k_weights, torch.bfloat16), whole)
    table = locate(experts.arena, torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE))
    numbers, missed = torch.where(slots < 0, -1, (slots + 1) % 3), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    looked_up = experts.kernels.lookup(hidden_states, experts.arena, numbers, table, missed, 0, top_k_weights)
    assert torch.equal(looked_up, whole)
    assert missed.item() == 0


def test_infinite_and_missing_scales_stay_in_their_expert():
    experts = of(*FIRST, num_slots=3)
    hidden_states, _, top_k_weights = routed(experts, 4, 2, torch.bfloat16)
    slots = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]], dtype=torch.int32, device=DEVICE)
    sound = [run(experts, hidden_states, slots, top_k_weights) for run in (decode, prefill)]
    for row, half in enumerate((0x7C00, 0xFC00, 0x7E01)):  # of blocks of 144 bytes
        experts.arena[2, 144 * row : 144 * row + 2] = torch.tensor([half & 255, half >> 8]).to(experts.arena)
    for run, expected in zip((decode, prefill), sound, strict=True):
        found = run(experts, hidden_states, slots, top_k_weights)
        assert torch.equal(found[[0, 3]], expected[[0, 3]])
        assert not found[[1, 2]].isfinite().any()


def test_types_without_a_kernel_are_declined():
    for name in BLOCKS:
        shapes = {"gate_up_proj": (512, 256), "down_proj": (256, 256)}
        tensors = [part for matrix, shape in shapes.items() for part in find_format(name).tensors(matrix, shape)]
        record = RecordLayout.pack(tensors, tuple(MatrixSpec(matrix, name, shape) for matrix, shape in shapes.items()))
        assert (TritonExperts.build(record, SILU) is not None) == (name in BLOCK_FORMATS)
