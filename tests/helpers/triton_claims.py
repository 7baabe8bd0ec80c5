"""What the Triton kernels must do, against plain float64 arithmetic on dequantised weights.

Collected by `test_triton_kernels.py`, which runs this file in a process of its own: on the GPU where there is one, else
on CPU tensors under Triton's interpreter, whose switch must be set before anybody imports Triton.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.core import MatrixSpec, RecordLayout
from moeflow.kernels.activations import Activation
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, find_format
from moeflow.kernels.triton import matrix
from moeflow.kernels.triton.experts import TritonExperts, available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
SILU = Activation("silu", "concatenated")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
QUANTISED = [name for name, spec in FORMATS.items() if spec.kind != "float"]
FLOATS = ["float32", "bfloat16", "float16"]

assert available(), "neither a GPU nor TRITON_INTERPRET=1"
if DEVICE == "cpu":  # the interpreter is paid by the program: give each more rows, and leave the order of sums as it is
    for key, (_, blocks) in matrix._DECODE_BLOCKS.items():
        matrix._DECODE_BLOCKS[key] = (64, blocks)


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
    width = experts.kernels.first.in_features
    hidden_states = torch.randn(num_tokens, width, generator=generator).to(dtype)
    slots = torch.randint(-1, experts.arena.shape[0], (num_tokens, top_k), generator=generator, dtype=torch.int32)
    top_k_weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype)
    return hidden_states.to(DEVICE), slots.to(DEVICE), top_k_weights.to(DEVICE)


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
    experts.kernels.prefill(hidden_states, experts.arena, present, tokens, offsets, places, outputs)
    return experts.kernels.combine(outputs, top_k_weights, hidden_states.dtype)


def decode(experts, hidden_states, slots, top_k_weights):
    return experts.kernels.decode(hidden_states, experts.arena, slots, top_k_weights)


def error(result, expected):
    """Return the relative norm of the difference."""
    assert torch.isfinite(result).all()
    norm = torch.linalg.vector_norm(expected)
    difference = torch.linalg.vector_norm(result.cpu().double() - expected)
    return (difference / norm if norm > 0 else difference).item()


@pytest.mark.parametrize(
    "name",
    [
        *FLOATS,
        "int8",
        "int8-g32",
        "int4-g32",
        "int4-g64",
        "int4-g128",
        "int3-g64",
        "int2-g64",
        "int1-g64",
        "mxfp4",
        "fp8",
    ],
)
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
        outputs[part] = experts.kernels.pairs(hidden_states, experts.arena, tokens[part], slots.view(-1)[part])
    assert torch.equal(experts.kernels.combine(outputs, top_k_weights, torch.bfloat16), whole)


def test_prefill_is_the_same_bits_in_any_split_of_its_experts():
    experts = Experts("int3-g32", 64, 40)
    hidden_states, slots, _ = routed(experts, 20, 2, torch.bfloat16)
    present, tokens, offsets, places = group(slots)

    def run(begin, end, outputs):
        part = slice(offsets[begin], offsets[end])
        experts.kernels.prefill(
            hidden_states, experts.arena, present[begin:end], tokens[part], offsets[begin : end + 1] - offsets[begin],
            places[part], outputs,
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
    experts.kernels.prefill(hidden_states, experts.arena, slots, tokens, offsets, tokens.flip(0), outputs)
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


def test_what_the_kernels_cannot_read_is_declined():
    assert TritonExperts.build(RecordLayout.pack([("gate_up_proj", "F64", (4, 2))]), SILU) is None
    assert TritonExperts.build(RecordLayout.pack([("down_proj", "F32", (2, 2))]), SILU) is None
    wide = [("gate_up_proj", "F32", (4, 2)), ("down_proj", "F32", (2, 2))]
    assert TritonExperts.build(RecordLayout.pack(wide), SILU) is not None
    assert TritonExperts.build(RecordLayout.pack([*wide, ("router", "F32", (2, 2))]), SILU) is None
    assert TritonExperts.build(RecordLayout.pack(wide), SILU._replace(kind="swish")) is None
