"""The CPU kernels in every instruction set of this machine: against the oracle in float64, and bit for bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cpu_experts import AVAILABLE, SILU, Expert, error, needs_library, run, use
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS

FLOATS = ("float32", "bfloat16", "float16")
CODED = tuple(name for name, spec in FORMATS.items() if spec.kind not in ("float", "ggml"))
OAI = Activation("swiglu_oai", "interleaved", 1.702, 7.0)
ACTIVATIONS = (
    SILU,
    OAI,
    Activation("gelu", "concatenated"),
    Activation("gelu_tanh", "interleaved"),
    Activation("silu_limited", "concatenated", limit=1.5),
    Activation("silu_capped", "concatenated", limit=0.5),
    Activation("silu", "none", 1.702),
    Activation("relu", "none"),
    Activation("relu2", "none"),
)


@pytest.fixture(params=AVAILABLE or ["none"])
def forced(request):
    """Each instruction set in turn."""
    if not AVAILABLE:
        pytest.skip("moeflow was installed without a C++ compiler")
    use(request.param)
    yield request.param
    use("")


@needs_library
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no /proc/cpuinfo here")
def test_the_processor_is_asked_what_it_has():
    flags = set(next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), "").split())
    has_avx2 = flags >= {"avx2", "fma", "f16c"}
    has_avx512 = has_avx2 and flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
    assert [*AVAILABLE] == [*["avx512"] * has_avx512, *["avx2"] * has_avx2, "portable"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("form", [*FLOATS, *CODED])
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9])
def test_every_format_agrees_with_the_oracle(forced, form, num_tokens):
    expert = Expert(1, form, (136, 72), has_bias=True)
    x = torch.randn(num_tokens, 136, generator=torch.Generator().manual_seed(2))
    assert error(run([expert], x, [list(range(num_tokens))], num_tokens), expert.expected(x)) < 2e-6


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(AVAILABLE or ("none",)),
    st.sampled_from((*FLOATS, *CODED)),
    st.tuples(st.integers(1, 300), st.integers(1, 90)),
    st.sampled_from(ACTIVATIONS),
    st.integers(1, 14),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_any_shape_and_activation_agrees_with_the_oracle(
    name, form, shape, activation, num_tokens, has_bias, transposed, seed
):
    use(name)
    expert = Expert(seed, form, shape, activation, has_bias=has_bias, is_transposed=transposed)
    x = torch.randn(num_tokens, shape[0], generator=torch.Generator().manual_seed(seed))
    found, expected = run([expert], x, [list(range(num_tokens))], num_tokens), expert.expected(x)
    use("")
    assert (found - expected).norm() <= max(1e-5 * expected.norm() + 1e-6, expert.rounding(x).norm())


@needs_library
def test_a_sum_whose_terms_nearly_cancel_is_no_further_off_than_its_roundings(forced):
    expert = Expert(1, "fp8", (178, 1), has_bias=True)
    x = torch.randn(1, 178, generator=torch.Generator().manual_seed(1))
    found, expected = run([expert], x, [[0]], 1), expert.expected(x)
    assert (found - expected).norm() <= expert.rounding(x).norm() < 1e-3 * expected.norm()


@needs_library
def test_long_rows_and_many_tokens_agree_with_the_oracle(forced):
    for form in ("bfloat16", "int8", "int4-g128", "fp8"):
        expert = Expert(3, form, (1100, 260))
        x = torch.randn(205, 1100, generator=torch.Generator().manual_seed(4))
        assert error(run([expert], x, [list(range(205))], 205), expert.expected(x)) < 1e-5


@needs_library
@pytest.mark.parametrize("form", [form for form in CODED if form != "fp8"])
def test_rounded_activations_cost_less_than_a_ten_thousandth(forced, form):
    expert = Expert(5, form, (256, 512))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(6))
    linear = cpu.LinearKernel(expert.tensors, "gate_up_proj", expert.spec, (1024, 256))
    weight = dequantize(expert.tensors, "gate_up_proj", expert.spec, (1024, 256), torch.float64)
    exact, rounded = torch.empty(3, 1024), torch.empty(3, 1024)
    linear(x, exact)
    linear(x, rounded, activation_bits=16)
    expected = x.double() @ weight.T
    assert error(exact, expected) < 2e-6 < error(rounded, expected) < 1e-4
    outputs = run([expert], x, [[0, 1, 2]], 3, 16)
    assert error(outputs, expert.expected(x)) < 1e-4


@needs_library
@pytest.mark.parametrize("form", ["bfloat16", "int8-g32", "int4-g64", "mxfp4"])
@pytest.mark.parametrize("activation_bits", [0, 16])
def test_bits_do_not_depend_on_threads_or_grouping(forced, threads, form, activation_bits):
    experts = [Expert(seed, form, (200, 100), OAI, has_bias=True) for seed in range(3)]
    x = torch.randn(20, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    routes = [list(range(20)), [3], [5, 0, 7, 9, 2]]
    threads(1)
    whole = run(experts, x, routes, 26, activation_bits)
    for num_threads in (2, 3):
        threads(num_threads)
        assert torch.equal(run(experts, x, routes, 26, activation_bits), whole)
    parts = [run([e], x, [route], len(route), activation_bits) for e, route in zip(experts, routes, strict=True)]
    assert torch.equal(torch.cat(parts), whole)


@needs_library
@pytest.mark.parametrize("form", [*FLOATS, "int4-g32", "int3-g64", "fp8"])
def test_a_few_tokens_have_the_bits_of_each_alone(forced, form):
    expert = Expert(8, form, (150, 70))
    x = torch.randn(8, 150, generator=torch.Generator().manual_seed(9))
    alone = torch.cat([run([expert], x, [[token]], 1) for token in range(8)])
    for num_tokens in (2, 3, 4, 5, 8):
        together = run([expert], x, [list(range(num_tokens))], num_tokens)
        assert torch.equal(together, alone[:num_tokens])


@needs_library
@pytest.mark.parametrize("form", FLOATS)
def test_float_matrices_have_the_same_bits_for_any_number_of_tokens(forced, form):
    expert = Expert(8, form, (150, 70))
    x = torch.randn(30, 150, generator=torch.Generator().manual_seed(9))
    alone = torch.cat([run([expert], x, [[token]], 1) for token in range(30)])
    assert torch.equal(run([expert], x, [list(range(30))], 30), alone)


@needs_library
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("activation_bits", [0, 16])
def test_one_token_in_one_call_has_the_bits_of_experts_and_combine(forced, dtype, activation_bits):
    experts = [Expert(seed, form, (160, 96)) for seed, form in enumerate(("int4-g64", "bfloat16", "int8", "fp8"))]
    x = torch.randn(1, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).to(dtype)
    outputs = run(experts, x, [[0]] * 4, 4, activation_bits)
    expected = cpu.combine(outputs, weights, dtype)
    found = cpu.run_token(
        x, [e.kernel for e in experts], [e.address for e in experts], weights, activation_bits=activation_bits
    )
    assert torch.equal(found, expected)
    assert torch.equal(expected, (outputs * weights.float().T).sum(0, keepdim=True).to(dtype))


@needs_library
def test_experts_of_different_formats_share_a_call(forced):
    experts = [Expert(seed, form, (96, 40)) for seed, form in enumerate(("int4-g32", "int2-g128", "float16", "mxfp4"))]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    outputs = run(experts, x, [[0, 1], [2], [3], [4, 0]], 6)
    expected = [experts[0].expected(x[:2]), experts[1].expected(x[2:3]), experts[2].expected(x[3:4])]
    assert error(outputs, torch.cat([*expected, experts[3].expected(x[[4, 0]])])) < 2e-6


@needs_library
def test_no_tokens_and_experts_without_tokens_write_nothing(forced):
    experts = [Expert(seed, "bfloat16", (64, 32)) for seed in range(3)]
    x = torch.randn(1, 64)
    assert run(experts, x, [[], [], []], 2).isnan().all()
    outputs = run(experts, x, [[], [0], []], 2)
    assert outputs[0].isfinite().all()
    assert outputs[1].isnan().all()
    assert run([], x[:0], [], 0).shape == (0, 64)


@needs_library
def test_codes_of_the_padding_do_not_enter(forced):
    for form in ("fp8", "int4-g128", "mxfp4"):
        expert = Expert(2, form, (70, 33))
        x = torch.randn(9, 70)
        before = [run([expert], x[:n], [list(range(n))], n) for n in (1, 9)]
        for name, shape in expert.shapes.items():
            codes, spec = expert.tensors[name], expert.spec
            codes[:, -(-shape[1] // 32) * 4 * spec.bits :] = 255
            if spec.kind == "fp8":
                codes[:, shape[1] :] = 127  # not a number
        assert all(
            torch.equal(run([expert], x[:n], [list(range(n))], n), old) for n, old in zip((1, 9), before, strict=True)
        )


@needs_library
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4-g64", "fp8"])
def test_not_a_number_stays_in_its_token(forced, form):
    expert = Expert(2, form, (70, 33))
    x = torch.randn(3, 70)
    x[1, 5] = torch.nan
    for activation_bits in (0, 16):
        outputs = run([expert], x, [[0, 1, 2]], 3, activation_bits)
        assert outputs[1].isnan().all()
        assert outputs[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 16, 100])
def test_linear_agrees_with_torch(forced, dtype, num_tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 2 * 77, generator=generator).to(dtype)[:, 77:]  # rows apart
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((130, 77), (130,)))
    for used in (bias, None):
        out = cpu.linear(x, weight, used)
        expected = x.double() @ weight.double().T + (0 if used is None else used.double())
        torch.testing.assert_close(out, expected.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=2e-5)


@needs_library
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("num_features", [8, 64, 77, 576, 1000, 4096])
def test_norm_has_torch_bits(forced, dtype, num_features):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch sums in another order here")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, num_features), (num_features,)))
    out = cpu.rms_norm(x, weight, 1e-6)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(out, expected)


@needs_library
def test_float16_of_any_bits_is_read_and_written_as_torch_does(forced):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = every.view(torch.float16)
    values = values[values.isfinite()].view(-1, 1)
    halves = cpu.combine(values.float() * 1.0003, torch.ones(len(values), 1), torch.float16)
    torch.testing.assert_close(halves, (values.float() * 1.0003).half(), rtol=0, atol=0)
    assert torch.equal(cpu.linear(values, torch.ones(1, 1, dtype=torch.float16), None), values)


def test_unknown_records_have_no_kernel():
    assert Expert(0, "float64", (8, 4)).kernel is None
    expert = Expert(0, "float32", (8, 4))
    assert ExpertKernel.build(expert.record, Activation("silu", "none"), is_transposed=False) is None
