"""Methods keep their bounds, on every shape and format; what cannot be quantised is named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.errors import CheckpointError, ConfigError
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS, WRITABLE
from moeflow.kernels.quantization.quantize import METHODS, quantize

ROUNDED = [name for name in WRITABLE if FORMATS[name].kind != "sign"]  # those with a step
FITTED = [name for name in WRITABLE if FORMATS[name].kind == "uint"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_weight(num_rows, in_features, seed=0, size=0.02):
    return size * torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(seed))


def heavy_weight(num_rows, in_features, seed=0):
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal, parts = (torch.randn(n, num_rows, in_features, generator=generator) for n in (1, 3))
    return 0.02 * normal[0] / parts.square().mean(0).sqrt()


def restore(weight, spec, **options):
    """Quantise and dequantise, in float64."""
    return dequantize(quantize(weight, spec, **options), "weight", spec, tuple(weight.shape), torch.float64)


def steps_of(stored, spec, shape):
    """The scale of each weight."""
    width = spec.group_size or spec.padded(shape[1])
    return stored["weight_scale"].double().repeat_interleave(width, dim=1)[:, : shape[1]]


def output_error(inputs, weight, found):
    return (inputs.double() @ (found - weight.double()).T).norm().item()


@pytest.mark.parametrize("name", ROUNDED)
@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(1, 6),
    in_features=st.integers(1, 200),
    size=st.sampled_from((1e-9, 1e-7, 1e-4, 0.02, 1.0, 1e3)),
    offset=st.sampled_from((0, 0, 3)),
    seed=st.integers(0, 999),
)
def test_rounding_is_within_half_a_step(name, num_rows, in_features, size, offset, seed):
    spec = FORMATS[name]
    weight = random_weight(num_rows, in_features, seed, size) + offset * size
    stored = quantize(weight, spec)
    found = dequantize(stored, "weight", spec, (num_rows, in_features), torch.float64)
    assert ((found - weight).abs() <= steps_of(stored, spec, weight.shape) * 0.5001).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=5, deadline=None)
@given(num_rows=st.integers(1, 5), in_features=st.integers(1, 150), seed=st.integers(0, 999))
def test_stored_tensors_are_those_of_the_format(name, method, num_rows, in_features, seed):
    spec, weight = FORMATS[name], random_weight(num_rows, in_features, seed)
    stored = quantize(weight, spec, method=method, calibration=random_weight(9, in_features, seed), name="up")
    dtypes = {torch.uint8: "U8", torch.half: "F16"}
    shapes = [(key, dtypes[tensor.dtype], tuple(tensor.shape)) for key, tensor in stored.items()]
    assert shapes == spec.tensors("up", (num_rows, in_features))
    assert all(tensor.is_contiguous() for tensor in stored.values())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("name", WRITABLE)
def test_last_group_of_an_odd_row_is_as_good_as_by_itself(name, method):
    spec, weight = FORMATS[name], random_weight(4, 140)
    last = 140 // spec.group_size * spec.group_size if spec.group_size else 0
    whole = restore(weight, spec, method=method)
    assert torch.equal(whole[:, last:], restore(weight[:, last:].clone(), spec, method=method))


@pytest.mark.parametrize("name", ["int4-g64", "int2-g32", "int1-g64", "int8"])
def test_gptq_gives_padding_no_say(name):
    spec = FORMATS[name]
    weight, inputs = random_weight(8, 100), random_weight(300, 100, seed=1, size=1.0)
    wide = torch.nn.functional.pad(inputs, (0, 28))
    padded = restore(torch.nn.functional.pad(weight, (0, 28)), spec, method="gptq", calibration=wide)[:, :100]
    narrow = restore(weight, spec, method="gptq", calibration=inputs)
    assert output_error(inputs, weight, narrow) <= 1.1 * output_error(inputs, weight, padded)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITABLE)
def test_odd_groups_stay_finite_and_sensible(name, method):
    spec = FORMATS[name]
    weight = random_weight(6, 128)
    weight[0] = 0
    weight[1] *= 1e-30  # no float16 scale is as small
    weight[2] *= 1e30  # nor as large
    weight[3] = 0.5  # all equal
    weight[4] = 0
    weight[4, 7] = -3
    found = restore(weight, spec, method=method, calibration=random_weight(40, 128, seed=1, size=1.0))
    assert found.isfinite().all()
    assert torch.equal(found[0], torch.zeros(128, dtype=torch.float64))
    assert found[1].abs().max() < 1e-6
    if method != "gptq":  # which may turn a sign to save the output
        assert (found[2].sign() == weight[2].sign())[weight[2].abs() > 1e28].all()
    assert found[2].abs().max() > 30000
    assert (found[3] - 0.5).abs().max() < 0.002


@pytest.mark.parametrize("name", ROUNDED)
def test_range_of_one_sign_still_holds_zero(name):
    weight = random_weight(3, 64).abs() + 1
    assert (quantize(weight, FORMATS[name]).get("weight_zero", torch.zeros(1)) == 0).all()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("make", [random_weight, heavy_weight])
def test_hqq_is_never_worse_than_rtn_in_the_error_it_minimises(name, make):
    spec, weight = FORMATS[name], make(32, 200)
    group = spec.group_size
    errors = [(restore(weight, spec, method=method) - weight).square() for method in ("hqq", "rtn")]
    hqq, rtn = (torch.nn.functional.pad(e, (0, spec.padded(200) - 200)).unflatten(1, (-1, group)) for e in errors)
    assert (hqq.sum(-1) <= rtn.sum(-1) * (1 + 1e-4)).all()  # in each group
    assert hqq.sum() < 0.95 * rtn.sum()


@pytest.mark.parametrize("name", ["int4-g64", "int3-g64", "int2-g64"])
def test_hqq_keeps_the_output_of_heavy_tailed_weights_better_than_rtn(name):
    spec, weight = FORMATS[name], heavy_weight(64, 256)
    inputs = random_weight(100, 256, seed=1, size=1.0)
    hqq, rtn = (output_error(inputs, weight, restore(weight, spec, method=m)) for m in ("hqq", "rtn"))
    assert hqq < 0.95 * rtn


def correlated_inputs(tokens, in_features, seed=5):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) * torch.logspace(0, -2, in_features)[:, None]
    return torch.randn(tokens, in_features, generator=generator) @ mix


@pytest.mark.parametrize("tokens", [400, 10, 1])
@pytest.mark.parametrize("name", WRITABLE)
def test_gptq_keeps_the_output_better_than_rtn(name, tokens):
    spec, weight = FORMATS[name], random_weight(48, 150)
    inputs = correlated_inputs(tokens, 150)
    gptq, rtn = (
        output_error(inputs, weight, restore(weight, spec, method=m, calibration=inputs)) for m in ("gptq", "rtn")
    )
    assert gptq < 0.8 * rtn


def test_gptq_learns_the_same_from_inputs_and_from_their_hessian():
    spec, weight = FORMATS["int4-g32"], random_weight(16, 64)
    inputs = correlated_inputs(64, 64)  # as many tokens as features: told apart by symmetry
    of_inputs = restore(weight, spec, method="gptq", calibration=inputs)
    of_hessian = restore(weight, spec, method="gptq", calibration=inputs.double().T @ inputs.double())
    assert torch.equal(of_inputs, of_hessian)


@pytest.mark.parametrize("calibration", [None, torch.zeros(0, 96), torch.zeros(5, 96), torch.zeros(96, 96)])
def test_gptq_without_anything_to_learn_from_is_hqq(calibration):
    spec, weight = FORMATS["int3-g32"], random_weight(8, 96)
    assert torch.equal(
        restore(weight, spec, method="gptq", calibration=calibration), restore(weight, spec, method="hqq")
    )


def test_gptq_takes_inputs_that_are_always_zero_in_some_features():
    spec, weight = FORMATS["int4-g32"], random_weight(8, 96)
    inputs = correlated_inputs(50, 96)
    inputs[:, 10:40] = 0
    found = restore(weight, spec, method="gptq", calibration=inputs)
    assert (found - weight).abs().max() < 0.02  # and they are not forgotten


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_strides_dtype_and_threads_change_no_bit(method):
    spec = FORMATS["int3-g64"]
    weight = random_weight(700, 300).bfloat16()
    expected = quantize(weight.float(), spec, method=method)
    torch.set_num_threads(3)
    found = quantize(weight.T.contiguous().T, spec, method=method)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["int4-g64", "int8", "bfloat16"])
def test_weight_that_is_no_number_is_named(name, method, value):
    weight = random_weight(5, 70)
    weight[3, 69] = value
    with pytest.raises(CheckpointError, match=r"expert 4 of layer 2 has (nan|inf|-inf) in row 3, column 69"):
        quantize(weight, FORMATS[name], method=method, name="expert 4 of layer 2")


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_format_that_is_only_read_is_refused(name):
    with pytest.raises(ConfigError, match=rf"cannot be quantised to {name}.*Allowed: int8, .*int4-g64"):
        quantize(random_weight(2, 64), FORMATS[name])


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"'awq' is not a method of quantisation\. Allowed: rtn, hqq, gptq"):
        quantize(random_weight(2, 64), FORMATS["int8"], method="awq")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(5, 63), r"calibration of up is \[5, 63\]\. Allowed: inputs \[tokens, 64\]"),
        (torch.zeros(64), r"calibration of up is \[64\]"),
        (torch.full((2, 64), float("nan")), r"calibration of up has NaN or infinite inputs"),
    ],
)
def test_bad_calibration_is_named(calibration, message):
    with pytest.raises(ConfigError, match=message):
        quantize(random_weight(2, 64), FORMATS["int4-g64"], method="gptq", calibration=calibration, name="up")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_float_formats_are_a_cast(dtype):
    weight = random_weight(3, 5).to(dtype)
    stored = quantize(weight, FORMATS["bfloat16"], name="up")
    assert list(stored) == ["up"]
    assert torch.equal(stored["up"], weight.bfloat16())
