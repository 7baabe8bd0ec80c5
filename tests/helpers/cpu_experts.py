"""Random experts for the CPU kernels, what they compute in float64, and the instruction sets that run them here."""

import pytest
import torch

from helpers.ggml_blocks import tame
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import library
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.structs import ExpertKernel
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}
SILU = Activation("silu", "concatenated")
_ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def available():
    """List the instruction sets of this machine, best first."""
    loaded = library.library()
    if loaded is None:
        return ()
    return tuple(
        name for name in library.INSTRUCTION_SETS if loaded.held.moeflow_cpu_use(name.encode()).decode() == name
    )


AVAILABLE = available()
if AVAILABLE:
    library.library().held.moeflow_cpu_use(b"")
needs_library = pytest.mark.skipif(not AVAILABLE, reason="moeflow was installed without a C++ compiler")


def use(name):
    library.library().held.moeflow_cpu_use(name.encode())


class Expert:
    """One expert of random bytes, its tensors, and what it computes in float64.

    The second matrix is in `down_form` where that is given, else in `form` too.
    """

    def __init__(self, seed, form, shape, activation=SILU, *, has_bias=False, is_transposed=False, down_form=None):
        generator = torch.Generator().manual_seed(seed)
        spec, (num_features, intermediate) = find_format(form), shape
        self.spec, self.activation = spec, activation
        self.is_transposed = is_transposed and spec.kind == "float"
        halves = 1 if activation.gate == "none" else 2
        shapes = {
            "up_proj" if halves == 1 else "gate_up_proj": (halves * intermediate, num_features),
            "down_proj": (num_features, intermediate),
        }
        self.specs = dict.fromkeys(shapes, spec)
        self.specs["down_proj"] = find_format(down_form or form)
        tensors, matrices = [], []
        for name, (rows, columns) in shapes.items():
            spec = self.specs[name]
            if spec.kind == "float":
                tensors.append((name, spec.dtype, (columns, rows) if self.is_transposed else (rows, columns)))
            else:
                tensors += spec.tensors(name, (rows, columns))
                matrices.append(MatrixSpec(name, spec.name, (rows, columns)))
            if has_bias:
                tensors.append((f"{name}_bias", "BF16", (rows,)))
        self.record = RecordLayout.pack(tensors, tuple(matrices))
        self.memory = torch.randint(0, 256, (self.record.num_bytes + 64,), dtype=torch.uint8, generator=generator)
        skipped = -self.memory.data_ptr() % 64
        self.address = self.memory.data_ptr() + skipped
        self.tensors = {}
        for tensor in self.record.tensors:
            start = skipped + tensor.offset
            values = self.memory[start : start + tensor.num_bytes].view(TORCH[tensor.dtype]).view(tensor.shape)
            self._fill(tensor.name, values, generator)
            self.tensors[tensor.name] = values
        self.shapes = shapes

    def _fill(self, name, values, generator):
        random = torch.rand(values.shape, generator=generator)
        if name.endswith("_scale"):
            low = torch.randint(118, 122, values.shape, generator=generator)
            values.copy_(low if values.dtype == torch.uint8 else (random + 0.1) * 0.02)
        elif name.endswith("_zero"):
            values.copy_(random * (2**self.spec.bits - 1))
        elif values.dtype != torch.uint8:
            values.copy_((random - 0.5) * 0.2)
        elif self.specs[name].kind == "ggml":
            tame(values, self.specs[name], generator)
        elif self.spec.kind == "fp8":
            values[(values & 127) == 127] = 3  # not a number
        elif self.spec.kind == "int":
            values[values == 128] = 1  # -128 is no code

    @property
    def kernel(self):
        return ExpertKernel.build(self.record, self.activation, is_transposed=self.is_transposed)

    def expected(self, x):
        first, down = (self._product(name) for name in self.shapes)
        return down(self.activation.apply(first(x.double())))

    def rounding(self, x):
        """Return what float32's roundings may cost an output, [n, H] in float64.

        The partial sums of a product are of the size of its terms' root of squares, so each sum is taken to be
        `_ROUNDINGS` of that off. Where terms nearly cancel, that is a large relative error of a small sum.
        """
        name = next(iter(self.shapes))
        before = self._product(name)(x.double())
        shift = _ROUNDINGS * self._product(name, torch.square)(x.double().square()).sqrt()
        hidden, places = self.activation.apply(before), torch.arange(before.shape[-1])
        changed = torch.zeros_like(hidden)
        for part in (places < len(places) // 2, places >= len(places) // 2, places % 2 == 0, places % 2 == 1):
            changed += (self.activation.apply(before + shift * part) - hidden).abs()
        return (changed + _ROUNDINGS * hidden.abs()) @ self.weight("down_proj").abs().T

    def _product(self, name, each=lambda values: values):
        weight, bias = each(self.weight(name)), self.tensors.get(f"{name}_bias")
        return lambda x: x @ weight.T + (0 if bias is None else each(bias.double()))

    def weight(self, name):
        if self.specs[name].kind != "float":
            return dequantize(self.tensors, name, self.specs[name], self.shapes[name], torch.float64)
        weight = self.tensors[name].double()
        return weight.T if self.is_transposed else weight


def run(experts, x, routes, num_places, activation_bits=0):
    """Run experts on their tokens, `routes` [E] of lists of tokens; places are numbered as they come."""
    starts, tokens = [0], []
    for route in routes:
        tokens += route
        starts.append(len(tokens))
    outputs = torch.full((num_places, x.shape[1]), torch.nan)
    cpu.run_experts(
        x, [e.kernel for e in experts], [e.address for e in experts], starts, tokens, list(range(len(tokens))), outputs,
        activation_bits=activation_bits,
    )  # fmt: skip
    return outputs


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
