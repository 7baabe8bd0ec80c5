"""Compile the Triton kernels for an H100 without having one: what the interpreter takes, a GPU's compiler may refuse.

Run by `test_triton_kernels.py` in a process of its own, interpreter off. Prints one line a kernel.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.triton import combine, decode, prefill
from moeflow.kernels.triton.activation import constants
from moeflow.kernels.triton.matrix import MatrixPlan

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"arena": "*u8", "slots": "*i32", "tokens": "*i32", "offsets": "*i32", "sources": "*i32", "places": "*i32"}
ALIGNED = ("inputs", "outputs", "arena", "slots", "slot_bytes")


def compile_kernel(kernel, types, values):
    """Compile one kernel as a launch with aligned tensors would. Returns its PTX."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in values else types.get(name, POINTERS.get(name, "i32")) for name in names}
    constexprs = {(names.index(name),): value for name, value in values.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": 4, "enable_fp_fusion": True}).asm["ptx"]


def main():
    """Compile decode and prefill of some formats, and combine."""
    for name in ("bfloat16", "bf16-lossless-48", "int3-g64", "int4-g64", "mxfp4", "fp8"):
        spec, shape = find_format(name), (256, 192)
        matrices = () if spec.kind == "float" else (MatrixSpec("gate_up_proj", name, shape),)
        record = RecordLayout.pack(spec.tensors("gate_up_proj", shape), matrices)
        plan = MatrixPlan.find(record, "gate_up_proj", is_transposed=False)
        common = {**plan.constants(), **constants(Activation("silu", "concatenated"))}
        rows, blocks = plan.decode_blocks()
        ptx = compile_kernel(
            decode._multiply_pairs,
            {"inputs": "*bf16", "outputs": "*fp32"},
            {**common, "HAS_TOKENS": False, "BLOCK_ROWS": rows, "BLOCKS": blocks},
        )
        print(f"{name} decode: {ptx.count('ld.global.v4.b32')} loads of 16 bytes")
        rows, blocks = plan.prefill_blocks(is_exact=False)
        tile = {"EXPERTS": 8, "BLOCK_TOKENS": 64, "BLOCK_ROWS": rows, "BLOCKS": blocks}
        ptx = compile_kernel(
            prefill._multiply_groups,
            {"inputs": "*bf16", "outputs": "*bf16"},
            {**common, "HAS_SOURCES": True, "HAS_PLACES": False, **tile},
        )
        assert "wgmma" in ptx or "mma.sync" in ptx, "prefill does not use tensor cores"
        print(f"{name} prefill: on tensor cores")
    types = {"outputs": "*fp32", "weights": "*bf16", "sums": "*bf16"}
    compile_kernel(combine._combine, types, {"TOP_K": 2, "BLOCK": 256})
    print("combine")


if __name__ == "__main__":
    main()
