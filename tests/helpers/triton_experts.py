"""Random experts for the Triton kernels, what they compute in float64, and ways to run the kernels on them."""

import torch

from helpers.ggml_blocks import tame
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.triton.experts import TritonExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
SILU = Activation("silu", "concatenated")


class Experts:
    """Random experts of one layout in an arena, and what they compute in float64.

    Args:
        first_format: of gate and up; `down_format` of down.
        width: H, and `inner`: I.
    """

    def __init__(
        self,
        first_format,
        width,
        inner,
        *,
        down_format=None,
        activation=SILU,
        bias=False,
        transposed=False,
        num_slots=5,
    ):
        generator = torch.Generator().manual_seed(width * 1000 + inner)
        self.activation, self.transposed, self.inner = activation, transposed, inner
        first = "up_proj" if activation.gate == "none" else "gate_up_proj"
        self.shapes = {first: (inner * (1 if activation.gate == "none" else 2), width), "down_proj": (width, inner)}
        formats = {first: find_format(first_format), "down_proj": find_format(down_format or first_format)}
        tensors, matrices = [], []
        for name, shape in self.shapes.items():
            spec = formats[name]
            if spec.kind == "float":
                tensors.append((name, spec.dtype, shape[::-1] if transposed else shape))
            else:
                matrices.append(MatrixSpec(name, spec.name, shape))
                tensors += spec.tensors(name, shape)
            if bias:
                tensors.append((f"{name}_bias", "BF16", shape[:1]))
        self.record = RecordLayout.pack(tensors, tuple(matrices))
        self.formats = formats
        arena = torch.full((num_slots, self.record.num_bytes + 64), 255, dtype=torch.uint8)
        for slot in arena:
            self._fill(slot, generator)
        self.arena = arena.to(DEVICE)
        self.kernels = TritonExperts.build(self.record, activation, is_transposed=transposed)
        assert self.kernels is not None
        self.values = [self._weights(slot) for slot in arena]

    def _fill(self, slot, generator):
        for tensor in self.record.tensors:
            view = self._view(slot, tensor)
            matrix, _, part = tensor.name.partition("_proj")
            spec = self.formats.get(f"{matrix}_proj")
            if part == "" and spec.kind != "float":
                view.copy_(torch.randint(0, 256, view.shape, generator=generator))
                if spec.kind == "ggml":
                    tame(view, spec, generator)
                if spec.kind == "fp8":
                    view[view & 0x7F == 0x7F] = 0x31
                    view[:, self.shapes[tensor.name][1] :] = 0x7F  # padding may be NaN
            elif tensor.dtype == "U8":
                view.copy_(torch.randint(118, 124, view.shape, generator=generator))
            elif part == "_zero":
                view.copy_(torch.rand(view.shape, generator=generator) * (2**spec.bits - 1))
            else:
                largest = {"int": 128, "fp8": 448, "float": 1}.get(spec.kind, 2 ** (spec.bits - 1))
                view.copy_(torch.randn(view.shape, generator=generator) / (8 if part == "_bias" else 8 * largest))

    def _view(self, slot, tensor):
        raw = slot[tensor.offset : tensor.offset + tensor.num_bytes]
        return raw.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def _weights(self, slot):
        tensors = {tensor.name: self._view(slot, tensor) for tensor in self.record.tensors}
        weights = {name: tensors[name].double() for name in tensors if name.endswith("_bias")}
        for name, shape in self.shapes.items():
            if self.formats[name].kind == "float":
                weights[name] = (tensors[name].T if self.transposed else tensors[name]).double()
            else:
                weights[name] = dequantize(tensors, name, self.formats[name], shape, dtype=torch.float64)
        return weights

    def expected(self, hidden_states, slot):
        """Run the expert in a slot on tokens [n, H] in float64. Returns [n, H]."""
        if slot < 0:
            return torch.zeros(hidden_states.shape, dtype=torch.float64)
        weights, act = self.values[slot], self.activation
        first = next(iter(self.shapes))
        sums = hidden_states.cpu().double() @ weights[first].T + weights.get(f"{first}_bias", 0)
        inner = act.apply(sums)
        return inner @ weights["down_proj"].T + weights.get("down_proj_bias", 0)

    def expected_sum(self, hidden_states, slots, top_k_weights):
        """Run routed experts in float64. Returns [T, H]."""
        rows = [
            sum(w * self.expected(x[None], s)[0] for s, w in zip(chosen, chosen_weights, strict=True))
            for x, chosen, chosen_weights in zip(
                hidden_states, slots.tolist(), top_k_weights.double().tolist(), strict=True
            )
        ]
        return torch.stack(rows)


def routed(experts, num_tokens, top_k, dtype, seed=0):
    """Draw tokens [T, H], slots [T, K] (-1 among them) and router weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    width = experts.kernels.plan.first.in_features
    hidden_states = torch.randn(num_tokens, width, generator=generator).to(dtype)
    slots = torch.randint(-1, experts.arena.shape[0], (num_tokens, top_k), generator=generator, dtype=torch.int32)
    top_k_weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype)
    return hidden_states.to(DEVICE), slots.to(DEVICE), top_k_weights.to(DEVICE)


def locate(arena, slots):
    """Return the locations of slots of an arena, -1 for -1."""
    return torch.where(slots < 0, -1, slots * (arena.stride(0) // 64)).int()


def group(slots):
    """Sort routes by expert: (slots [E'], tokens [S], offsets [E' + 1], places [S])."""
    flat = slots.reshape(-1)
    order = flat.argsort(stable=True)
    present, counts = flat.unique(return_counts=True)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    return present.int(), (order // slots.shape[1]).int(), offsets, order.int()


def prefill(experts, hidden_states, slots, top_k_weights):
    outputs = torch.zeros(slots.numel(), hidden_states.shape[1], device=DEVICE)
    present, tokens, offsets, places = group(slots)
    located = locate(experts.arena, present)
    experts.kernels.prefill(hidden_states, experts.arena, located, tokens, offsets, places, outputs)
    return experts.kernels.combine(outputs, top_k_weights, hidden_states.dtype)


def decode(experts, hidden_states, slots, top_k_weights):
    located = locate(experts.arena, slots)
    return experts.kernels.decode(hidden_states, experts.arena, located, top_k_weights)


def error(result, expected):
    """Return the relative norm of the difference."""
    assert torch.isfinite(result).all()
    norm = torch.linalg.vector_norm(expected)
    difference = torch.linalg.vector_norm(result.cpu().double() - expected)
    return (difference / norm if norm > 0 else difference).item()
