"""Matrices in GGML's blocks in a native step: the bits of the calls, and what does not fit is refused."""

import pytest
import torch

from helpers.cpu_experts import needs_library
from helpers.ggml_blocks import random_matrix
from moeflow.kernels.cpu.blocks import block_linear, block_rows
from moeflow.kernels.cpu.step import DONE, StepCode, StepIndexError, StepState, instruction_words, tensor_words
from moeflow.kernels.cpu.structs import block_number
from moeflow.step.bound import _packed_formats
from moeflow.step.fuse import fuse
from moeflow.step.program import DTYPES, KINDS, Buffer, Instruction, Operand, Program
from moeflow.step.sound import _RULES


def words(tensor):
    dtype = torch.bool if tensor.dtype == torch.uint8 else tensor.dtype
    return tensor_words(tensor.data_ptr(), DTYPES.index(dtype), tuple(tensor.shape), tensor.stride())


def run(kind, whole, tensors):
    code = StepCode([instruction_words(KINDS.index(kind), whole, [], [words(tensor) for tensor in tensors])])
    done = torch.zeros(1, dtype=torch.int64)
    return code.run(0, StepState(num_rows=3, num_live=3, num_threads=1, is_done=done.data_ptr()))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_joined_linears_have_the_bits_of_their_calls(dtype, has_bias):
    forms = ("q4_k", "q6_k", "q8_0")
    blocks = [random_matrix(form, (20 + i, 512), i) for i, form in enumerate(forms)]
    x = torch.randn(3, 512).to(dtype)
    biases = [torch.randn(len(table)).to(dtype) if has_bias else None for table in blocks]
    outs = [torch.empty(3, len(table), dtype=dtype) for table in blocks]
    packed = int.from_bytes(bytes(map(block_number, forms)), "little")
    given = [bias for bias in biases if bias is not None]
    assert run("linear", [3, 1, packed], [outs[0], x, *blocks, *given, *outs[1:]]) == DONE
    for out, form, table, bias in zip(outs, forms, blocks, biases, strict=True):
        assert torch.equal(out, block_linear(x, table, form, bias))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_bits_of_their_call(dtype):
    table, ids, out = random_matrix("q5_k", (9, 256)), torch.tensor([8, 0, 3]), torch.empty(3, 256, dtype=dtype)
    assert run("rows", [block_number("q5_k")], [out, ids, table]) == DONE
    assert torch.equal(out, block_rows(ids, table, "q5_k", 256, dtype))
    with pytest.raises(StepIndexError):
        run("rows", [block_number("q5_k")], [out, ids + 1, table])


def operand(number, sizes, dtype=torch.bfloat16):
    strides = tuple(torch.empty(sizes, device="meta").stride())
    return Operand(number, dtype, sizes, strides, 0)


def linear(number, rows, form, size, **changes):
    sizes = {"out": (3, rows), "x": (3, 512), "blocks": (rows, size), **changes}
    made = {
        name: operand(number if name != "x" else 0, one, torch.uint8 if name == "blocks" else torch.bfloat16)
        for name, one in sizes.items()
    }
    return Instruction("linear", (made.pop("out"),), tuple(made.values()), {"formats": [form]})


def test_matrices_that_do_not_fit_are_refused():
    assert _RULES["linear"](linear(1, 20, "q4_k", 288))
    assert _RULES["linear"](linear(1, 20, "q4_k", 288, bias=(20,)))
    for wrong in (
        linear(1, 20, "q4_k", 287), linear(1, 20, "q5_k", 288), linear(1, 20, "int8", 512), linear(1, 20, "tq2_0", 132),
        linear(1, 20, "q4_k", 288, out=(3, 21)), linear(1, 20, "q4_k", 288, x=(3, 256)),
        linear(1, 20, "q4_k", 288, bias=(19,)), linear(1, 20, "q4_k", 288, x=(3, 500)),
    ):  # fmt: skip
        assert not _RULES["linear"](wrong)
    ids, table = operand(0, (3,), torch.int64), operand(1, (9, 288), torch.uint8)
    rows = Instruction("rows", (operand(2, (3, 512)),), (ids, table), {"formats": ["q4_k"]})
    assert _RULES["rows"](rows)
    assert not _RULES["rows"](Instruction("rows", (operand(2, (3, 256)),), (ids, table), {"formats": ["q4_k"]}))
    assert not _RULES["rows"](Instruction("rows", rows.outputs, rows.inputs))


def test_linears_of_one_x_are_joined_with_their_formats():
    parts = [linear(1, 20, "q4_k", 288), linear(2, 21, "q6_k", 420)]
    buffers = [Buffer("made", "", 3072), *[Buffer("weight", str(n), 1 << 20) for n in range(2)]]
    fused = fuse(Program(3, buffers, [], parts, operand(0, (3, 1, 512)))).body
    assert [one.attributes for one in fused] == [{"formats": ["q4_k", "q6_k"]}]
    numbers = block_number("q4_k"), block_number("q6_k")
    assert _packed_formats(fused[0]) == numbers[0] + 256 * numbers[1]
