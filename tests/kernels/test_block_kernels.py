"""The CPU kernels of GGML's blocks in every instruction set of this machine: against the oracle, and bit for bit."""

import pytest
import torch

from helpers.cpu_experts import AVAILABLE, SILU, Expert, error, needs_library, run, use
from helpers.ggml_blocks import BLOCKS, WITH_KERNELS, random_matrix, tame
from moeflow.core import MatrixSpec, RecordLayout
from moeflow.errors import ConfigError
from moeflow.kernels.activations import Activation
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.blocks import block_linear, block_rows
from moeflow.kernels.cpu.structs import DTYPES, ExpertKernel
from moeflow.kernels.quantization.formats import FORMATS
from moeflow.kernels.quantization.ggml_values import block_values

SHAPE = (40, 768)
pytestmark = needs_library


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


def inputs(num_tokens, in_features=SHAPE[1], seed=1):
    return torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", WITH_KERNELS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 30])
def test_products_agree_with_the_oracle(forced, form, num_tokens):
    blocks, x = random_matrix(form, SHAPE), inputs(num_tokens)
    bias = torch.randn(SHAPE[0]) * 0.1
    expected = x.double() @ block_values(blocks, form).double().T + bias.double()
    assert error(block_linear(x, blocks, form, bias), expected) < 2e-6
    rounded = block_linear(x, blocks, form, bias, activation_bits=16)
    assert error(rounded, expected) < 1e-4
    assert num_tokens > 8 or not torch.equal(rounded, block_linear(x, blocks, form, bias))


SMALL_SCALES = {
    "q2_k": (0, 16), "q3_k": (96, 108), "q4_k": (4, 16), "q5_k": (4, 16), "q6_k": (192, 208), "iq4_xs": (2, 8),
}  # fmt: skip


@pytest.mark.parametrize("form", WITH_KERNELS)
def test_codes_and_scales_at_their_ends_stay_exact(forced, form):
    spec = FORMATS[form]
    ends = [(codes, scales) for codes in (0, 255) for scales in (0, 127, 128, 255)]
    blocks = torch.stack([torch.full((3 * spec.block_bytes,), codes, dtype=torch.uint8) for codes, _ in ends])
    for row, (_, scales) in zip(blocks, ends, strict=True):
        row.view(-1, spec.block_bytes)[:, slice(*SMALL_SCALES.get(form, (0, 0)))] = scales
    tame(blocks, spec, torch.Generator().manual_seed(0))
    x = torch.full((2, 3 * spec.group_size), 3.0)  # rounded to the largest whole number
    x[1] = -x[1]
    expected = x.double() @ block_values(blocks, form).double().T
    for bits, bound in ((0, 2e-6), (16, 2e-5)):
        assert ((block_linear(x, blocks, form, None, bits) - expected).abs() <= bound * expected.abs().max(0)[0]).all()


@pytest.mark.parametrize("form", WITH_KERNELS)
@pytest.mark.parametrize("activation_bits", [0, 16])
def test_bits_do_not_depend_on_tokens_rows_or_threads(forced, threads, form, activation_bits):
    blocks, x = random_matrix(form, (203, 512)), inputs(8, 512)
    threads(1)
    alone = torch.cat([block_linear(x[t : t + 1], blocks, form, None, activation_bits) for t in range(8)])
    for num_tokens in (2, 3, 4, 5, 7, 8):
        assert torch.equal(block_linear(x[:num_tokens], blocks, form, None, activation_bits), alone[:num_tokens])
    some = block_linear(x, blocks[5:12].contiguous(), form, None, activation_bits)
    assert torch.equal(some, alone[:, 5:12])
    many = block_linear(inputs(40, 512), blocks, form, None, activation_bits)
    threads(3)
    assert torch.equal(block_linear(x, blocks, form, None, activation_bits), alone)
    assert torch.equal(block_linear(inputs(40, 512), blocks, form, None, activation_bits), many)


@pytest.mark.parametrize("form", [form for form in WITH_KERNELS if FORMATS[form].group_size == 32])
@pytest.mark.parametrize("in_features", [32, 96, 128, 576, 672])
def test_rows_of_any_number_of_small_blocks_agree_with_the_oracle(forced, form, in_features):
    blocks, x = random_matrix(form, (11, in_features)), inputs(4, in_features)
    expected = x.double() @ block_values(blocks, form).double().T
    for bits, bound in ((0, 2e-6), (16, 1e-4)):
        found = block_linear(x, blocks, form, None, bits)
        assert error(found, expected) < bound
        assert torch.equal(torch.cat([block_linear(one.unsqueeze(0), blocks, form, None, bits) for one in x]), found)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_results_are_rounded_once(forced, dtype):
    blocks, x = random_matrix("q4_k", SHAPE), inputs(3).to(dtype)
    for bits in (0, 16):
        found = block_linear(x, blocks, "q4_k", None, bits)
        assert found.dtype == dtype
        assert torch.equal(found, block_linear(x.float(), blocks, "q4_k", None, bits).to(dtype))
    usual = block_linear(x, blocks, "q4_k", None, 0 if dtype == torch.float32 else 16)
    assert torch.equal(block_linear(x, blocks, "q4_k", None), usual)


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_have_the_bits_of_the_oracle(forced, form, dtype):
    blocks, ids = random_matrix(form, (7, 2560)), torch.tensor([[6, 0], [3, 3]])
    expected = block_values(blocks, form)[ids].to(dtype)
    assert torch.equal(block_rows(ids, blocks, form, 2560, dtype), expected)
    assert block_rows(ids[:0], blocks, form, 2560, dtype).shape == (0, 2, 2560)


def test_rows_that_are_not_there_and_other_tensors_are_refused():
    blocks = random_matrix("q8_0", (7, 64))
    for form, table in (("q8_0", blocks), ("tq2_0", random_matrix("tq2_0", (7, 256)))):
        for wrong in (-1, 7):
            with pytest.raises(IndexError, match="of a matrix with 7: no such row"):
                block_rows(torch.tensor([0, wrong]), table, form, {"q8_0": 64}.get(form, 256), torch.float32)
    for table, form, in_features, match in (
        (blocks, "q8_0", 96, r"Allowed: uint8 \[7, 102\]"), (blocks.char(), "q8_0", 64, "int8"),
        (blocks.T, "q8_0", 64, "not contiguous"), (blocks, "q8_0", 65, "multiples of 32"),
        (blocks, "int8", 64, "has no blocks"), (blocks, "q9_0", 64, "not a weight format"),
        (blocks.to("meta"), "q8_0", 64, "on meta"), (blocks[0], "q8_0", 64, "uint8"),
        (blocks[0, 0], "q8_0", 64, "uint8"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            block_rows(torch.tensor([0]), table, form, in_features, torch.float32)


def test_what_no_kernel_takes_is_left_to_the_caller():
    blocks, x, bias = random_matrix("q8_0", (7, 64)), inputs(2, 64), torch.zeros(7)
    assert block_linear(x, blocks, "q8_0", bias) is not None
    for changed in (
        (x.double(), blocks, "q8_0", bias), (x[:0], blocks, "q8_0", bias), (x.to("meta"), blocks, "q8_0", bias),
        (x[:, :32], blocks, "q8_0", bias), (x[:, :33], blocks, "q8_0", bias), (x, blocks, "q4_0", bias),
        (x, blocks, "tq2_0", bias), (x, blocks, "int8", bias), (x, blocks, "q9", bias), (x, blocks.int(), "q8_0", bias),
        (x, blocks.T, "q8_0", bias), (x, blocks[:0], "q8_0", None), (x, blocks[0, 0], "q8_0", None),
        (x, blocks, "q8_0", bias[:6]), (x, blocks, "q8_0", bias.double()), (torch.tensor(1.0), blocks, "q8_0", None),
    ):  # fmt: skip
        assert block_linear(*changed) is None


@pytest.mark.parametrize("form", WITH_KERNELS)
def test_any_bytes_are_read_without_a_fault_and_stay_in_their_rows(forced, form):
    size = FORMATS[form].tensors("", (30, 512))[0][2]
    damaged = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    damaged[20:25] = 255
    sound = random_matrix(form, (30, 512))
    mixed = torch.where((torch.arange(30) % 2 == 0).unsqueeze(1), sound, damaged)
    for num_tokens in (1, 4, 12):
        for bits in (0, 16):
            x = inputs(num_tokens, 512)
            assert block_linear(x, damaged, form, None, bits).shape == (num_tokens, 30)
            found = block_linear(x, mixed, form, None, bits)
            assert torch.equal(found[:, ::2], block_linear(x, sound, form, None, bits)[:, ::2])


@pytest.mark.parametrize("form", ["q8_0", "q4_k", "q6_k"])
def test_not_a_number_stays_in_its_token(forced, form):
    blocks, x = random_matrix(form, SHAPE), inputs(3)
    x[1, 5] = torch.nan
    for bits in (0, 16):
        found = block_linear(x, blocks, form, None, bits)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


GATES = (SILU, Activation("swiglu_oai", "interleaved", 1.702, 7.0), Activation("relu2", "none"))


@pytest.mark.parametrize("activation", GATES, ids=lambda one: one.gate)
@pytest.mark.parametrize(
    "forms", [("q4_k", "q6_k"), ("ggml_mxfp4", "ggml_mxfp4"), ("q2_k", "bfloat16"), ("q5_1", "q8_0")]
)
def test_experts_of_two_formats_agree_with_the_oracle(forced, threads, activation, forms):
    experts = [Expert(s, forms[0], (512, 256), activation, has_bias=True, down_form=forms[1]) for s in range(2)]
    x = inputs(12, 512)
    routes = [[0, 3, 5], list(range(12))]
    threads(1)
    found = run(experts, x, routes, 15)
    expected = torch.cat([e.expected(x[r]) for e, r in zip(experts, routes, strict=True)])
    assert error(found, expected) < 3e-6
    assert error(run(experts, x, routes, 15, 16), expected) < 2e-4
    threads(2)
    assert torch.equal(run(experts, x, routes, 15), found)
    weights = torch.tensor([[0.7, 0.3]])
    for bits in (0, 16):
        token = cpu.run_token(
            x[:1], [e.kernel for e in experts], [e.address for e in experts], weights, activation_bits=bits
        )
        assert torch.equal(token, cpu.combine(run(experts, x, [[0], [0]], 2, bits), weights, torch.float32))


def test_records_that_no_kernel_reads_have_none():
    for form in BLOCKS:
        shapes = {"gate_up_proj": (512, 256), "down_proj": (256, 256)}
        tensors = [tensor for name, shape in shapes.items() for tensor in FORMATS[form].tensors(name, shape)]
        record = RecordLayout.pack(tensors, tuple(MatrixSpec(name, form, shape) for name, shape in shapes.items()))
        kernel = ExpertKernel.build(record, SILU, is_transposed=False)
        assert (kernel is not None) == (form in WITH_KERNELS)
    ragged = RecordLayout.pack(tensors, (MatrixSpec("gate_up_proj", "q4_k", (512, 200)),))
    assert ExpertKernel.build(ragged, SILU, is_transposed=False) is None
