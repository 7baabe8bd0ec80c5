"""Asserts that an installed moeflow is whole: public names, every compiled library, a product by the CPU kernels."""

import sysconfig
from pathlib import Path

import torch

import moeflow
from moeflow.c_library import built_library
from moeflow.kernels.cpu import ops
from moeflow.kernels.cpu.library import instruction_set

FOLDER = Path(moeflow.__file__).parent
LIBRARIES = (
    "engine/regrouping/_regroup",
    "engine/regrouping/oracles/_split",
    "kernels/cpu/_cpu",
    "placement/solvers/_anneal",
    "replay/_replay",
)

assert FOLDER.is_relative_to(sysconfig.get_path("purelib")), FOLDER
assert [getattr(moeflow, name) for name in moeflow.__all__]
for library in LIBRARIES:
    path = FOLDER / library
    assert built_library(path.name, str(path.with_name("__init__.py"))), library
assert instruction_set() is not None, "the CPU kernels do not run"
assert instruction_set() != "portable" or "avx2" not in Path("/proc/cpuinfo").read_text(), "kernels miss AVX2"
x, weight = torch.randn(3, 64), torch.randn(5, 64)
out = ops.linear(x, weight, None)
assert out is not None, "the CPU kernels take no product"
assert torch.allclose(out, x @ weight.T, atol=1e-4), "the CPU kernels' product is wrong"
print(f"moeflow {moeflow.__version__} in {FOLDER}: CPU kernels on {instruction_set()}")
