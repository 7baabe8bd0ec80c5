"""Experts in the lossless format have the bits of bfloat16 in every instruction set, and no byte leads a kernel out."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cpu_experts import AVAILABLE, needs_library, run, use
from helpers.lossless_experts import any_bits, both
from helpers.paths import ROOT
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.layer import LayerKernel

pytestmark = needs_library
OAI = Activation("swiglu_oai", "interleaved", 1.702, 7.0)
SHAPES = ((64, 64), (190, 70), (576, 96), (1, 1), (63, 65), (128, 1), (1, 130))


@pytest.fixture(params=AVAILABLE or ["none"])
def forced(request):
    """Each instruction set in turn."""
    use(request.param)
    yield request.param
    use("")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _same(found, expected):
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 17, 40])
def test_outputs_have_the_bits_of_bfloat16(forced, threads, shape, num_tokens):
    floats, lossless = both(1, shape, OAI, has_bias=True, spare=3)
    x = torch.randn(num_tokens, shape[0], generator=torch.Generator().manual_seed(2))
    tokens = [list(range(num_tokens))]
    expected = run([floats], x, tokens, num_tokens)
    for number in (1, 2, 3):
        threads(number)
        assert _same(run([lossless], x, tokens, num_tokens), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(AVAILABLE or ("none",)),
    st.tuples(st.integers(1, 300), st.integers(1, 90)),
    st.integers(1, 40),
    st.sampled_from((0.0, 0.001, 0.1, 1.0)),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_a_product_with_any_bits_has_the_bits_of_bfloat16(name, shape, num_tokens, spread, is_half, seed):
    weight = any_bits(shape, seed, spread)
    weight = torch.where(weight.isfinite() & (weight.abs() < 1e30), weight, torch.zeros((), dtype=weight.dtype))
    floats, lossless = both(seed, (shape[1], shape[0]), make=lambda size, _: _tiled(weight, size))
    x = torch.randn(num_tokens, shape[1], generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16() if is_half else x
    use(name)
    found = [run([expert], x, [list(range(num_tokens))], num_tokens) for expert in (floats, lossless)]
    use("")
    is_nan = found[0].isnan()
    assert torch.equal(found[1].isnan(), is_nan)
    assert _same(found[1].masked_fill(is_nan, 0), found[0].masked_fill(is_nan, 0))


def _tiled(weight, size):
    times = [-(-wanted // there) for wanted, there in zip(size, weight.shape, strict=True)]
    return weight.repeat(times)[: size[0], : size[1]]


def test_infinite_and_missing_numbers_stay_in_their_rows(forced):
    floats, lossless = both(4, (130, 70))
    for value in (torch.inf, -torch.inf, torch.nan):
        for name in ("gate_up_proj", "down_proj"):
            changed, _ = both(4, (130, 70))
            changed.tensors[name][5, 3] = value
            stored = type(lossless)(changed)
            x = torch.randn(9, 130, generator=torch.Generator().manual_seed(0))
            for count in (1, 9):
                expected = run([changed], x[:count], [list(range(count))], count)
                found = run([stored], x[:count], [list(range(count))], count)
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert _same(run([lossless], x, [list(range(9))], 9), run([floats], x, [list(range(9))], 9))


@pytest.mark.parametrize("bits", [0, 16])
def test_a_layer_in_one_call_has_the_bits_of_bfloat16(forced, bits):
    pairs = [both(seed, (160, 96)) for seed in range(4)]
    index = torch.tensor([[0, 3], [2, 1], [3, 2]])
    x, weights = torch.randn(3, 160), torch.rand(3, 2)
    answers = []
    for kind in zip(*pairs, strict=True):
        kernels, addresses = [expert.kernel for expert in kind], np.array([expert.address for expert in kind])
        states = [
            LayerKernel(kernels, bits).run(x[:n], index[:n], weights[:n], addresses).hidden_states for n in (1, 3)
        ]
        one = cpu.run_token(
            x[:1], [kernels[0], kernels[3]], [int(addresses[0]), int(addresses[3])], weights[:1], activation_bits=bits
        )
        answers.append([*states, one])
    for first, other in zip(*answers, strict=True):
        assert _same(first, other)


def test_formats_share_a_call(forced):
    pairs = [both(seed, (96, 40)) for seed in range(3)]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    routes = [[0, 1], [2], [3, 4, 0]]
    expected = run([floats for floats, _ in pairs], x, routes, 6)
    assert _same(run([pairs[0][1], pairs[1][0], pairs[2][1]], x, routes, 6), expected)


def test_what_lies_in_the_padding_does_not_enter(forced):
    floats, lossless = both(2, (70, 33))
    x = torch.randn(9, 70)
    expected = [run([floats], x[:n], [list(range(n))], n) for n in (1, 9)]
    first = lossless.tensors["gate_up_proj"]
    blocks, places = first.view(len(first), 2, 96), _place(torch.arange(6, 64))
    for place in places.tolist():  # of values 70 to 127
        blocks[:, 1, place] = 255
        half = blocks[:, 1, 64 + place % 32]
        half |= 15 if place < 32 else 240
    for n, wanted in zip((1, 9), expected, strict=True):
        assert _same(run([lossless], x[:n], [list(range(n))], n), wanted)


def _place(value):
    part, lane = value // 16, value % 16
    return 16 * (lane // 4) + 8 * (part // 2) + 2 * (lane % 4) + part % 2


@pytest.mark.parametrize("name", AVAILABLE or ["none"])
def test_no_bytes_lead_a_kernel_out_of_its_record(name):
    """Between two pages that must not be touched, in a process of its own."""
    program = """
import ctypes, mmap, sys, torch
from helpers.cpu_experts import run
from helpers.lossless_experts import LosslessExpert, both
from moeflow.kernels.cpu.library import instruction_set
assert instruction_set() == sys.argv[1]
libc, page, generator = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, torch.Generator().manual_seed(0)
for seed, shape in enumerate(((64, 64), (190, 70), (63, 65), (1, 130), (128, 1), (320, 33))):
    floats, plain = both(seed, shape, spare=5 * (seed % 2))
    size = plain.record.num_bytes
    pages = -(-size // page)
    block = mmap.mmap(-1, (pages + 2) * page)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    for at in (0, (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + at), page, 0) == 0
    x = torch.randn(20, shape[0], generator=generator)
    for begin in (page, (pages + 1) * page - size):
        inner = whole[begin : begin + size]
        expert = LosslessExpert(floats, 5 * (seed % 2), inner)
        assert torch.equal(run([expert], x, [list(range(20))], 20), run([floats], x, [list(range(20))], 20))
        sound = inner.clone()
        for turn in range(25):
            inner.copy_(sound)
            chosen = torch.rand(size, generator=generator) < (1.0, 0.3, 0.01)[turn % 3]
            inner[chosen] = torch.randint(0, 256, (int(chosen.sum()),), dtype=torch.uint8, generator=generator)
            if turn % 5 == 4:  # all escapes are of the first value
                for tensor, values in expert.tensors.items():
                    values.view(torch.uint8).fill_(0 if tensor.endswith("_escapes") else 255)
            for count in (1, 3, 20):
                run([expert], x[:count], [list(range(count))], count)
print("sound")
"""
    environment = {**os.environ, "MOEFLOW_CPU_KERNELS": name}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run([sys.executable, "-c", program, name], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "sound"), done.stderr[-2000:]
