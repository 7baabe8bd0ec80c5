"""Checkpoints that are quantised already: every bit of their experts counts, and every way they can be bad is named."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.prequantized_checkpoints import (
    fp8_quantiser,
    make,
    tiny_model,
)
from helpers.prequantized_models import (
    CASES,
    GPTQ,
    change,
    expected_matrices,
    logits,
    open_store,
    plain_logits,
    read_expert,
    relative,
)
from moeflow import load_moe
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.prequantized.scheme import QuantizationScheme, read_scheme
from moeflow.checkpoint.prequantized.values import in_format, values
from moeflow.convert.pack import pack_model
from moeflow.hf.expert_sources import expert_tensor_names, map_experts
from moeflow.hf.files.config import load_config
from moeflow.hf.model_folder import ModelFolder
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.loading.describe import describe_model


def test_records_hold_exactly_the_values_of_the_checkpoint(made):
    store = open_store(made.native)
    for number, source in enumerate(store.layers):
        assert {spec.format for spec in source.layout.record.matrices} == {made.format}
        for expert in range(source.layout.num_experts):
            stored = read_expert(store, number, expert)
            expected = expected_matrices(made.exact, source.layout.name, expert)
            for spec in source.layout.record.matrices:
                found = dequantize(stored, spec.name, find_format(spec.format), spec.shape, torch.float64)
                assert torch.equal(found, expected[spec.name].double()), (source.layout.name, expert, spec.name)
    store.close()


@pytest.mark.slow
def test_logits_are_those_of_the_unquantised_values(made):
    for found, expected in zip(
        logits(made.native, dtype="float32"), plain_logits(made.plain, torch.float32), strict=True
    ):
        assert relative(found, expected) < 1e-5


@pytest.mark.slow
def test_any_share_of_the_experts_in_memory_gives_the_same_bits(made):
    some, whole = (logits(made.native, expert_memory=share) for share in ("75%", "100%"))
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=True))


def test_dense_weights_are_plain_values_and_nothing_is_missing_or_left_over(made):
    caller = load_config(made.native)
    model, info = load_moe(made.native, config=caller, dtype="float32", predictor=None, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, value in made.exact.items():
        if ".experts" not in name:
            assert torch.equal(state[name], value.float()), name
    assert not hasattr(model.config, "quantization_config")
    assert caller.quantization_config, "the caller's config was changed"
    model.moeflow.close()


def test_every_piece_of_an_expert_is_told_apart_from_dense_tensors(made):
    tensors = open_checkpoint(made.native).tensors
    feeding = expert_tensor_names(ModelFolder(made.native).empty_model(), tensors)
    assert feeding == {name for name in tensors if ".experts." in name}


@pytest.mark.slow
def test_packed_folder_gives_the_same_bits(made, tmp_path):
    packed = pack_model(made.native, tmp_path / "packed").folder
    for found, expected in zip(logits(packed), logits(made.native), strict=True):
        assert torch.equal(found, expected)
    assert describe_model(packed)["dtype"] == describe_model(made.native)["dtype"] == made.format


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4, gpt-oss", "fp8, qwen3", "gptq, mixtral", "awq, qwen3"])
def test_bfloat16_logits_are_close_to_those_of_the_values_in_float32(name, tmp_path):
    case = CASES[name]
    model = tiny_model(case.family, **case.sizes, dtype=torch.bfloat16)
    native, plain, _ = make(tmp_path, model, case.quantization, case.quantise, case.is_quantised)
    expected = plain_logits(plain, torch.float32)
    error = relative(logits(native)[0], expected[0])
    own = relative(plain_logits(plain, torch.bfloat16)[0], expected[0])  # what bfloat16 alone costs
    assert error < max(1e-2, 1.5 * own)


def test_many_threads_read_what_one_reads(gptq):
    store = open_store(gptq)
    keys = [(layer, expert) for layer in range(2) for expert in range(4)] * 4
    alone = [read_expert(store, *key) for key in keys[:8]] * 4
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda key: read_expert(store, *key), keys))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    store.close()


def test_fp8_experts_stacked_in_one_tensor_are_read(fp8):
    tensors = {}
    for file in fp8.glob("*.safetensors"):
        tensors |= load_file(file)
    separate = logits(fp8, dtype="float32")
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for ending in ("", "_scale_inv"):

            def all_experts(part, stem=stem, ending=ending):
                return torch.stack([tensors[f"{stem}.{e}.{part}.weight{ending}"].view(torch.uint8) for e in range(4)])

            kind = torch.float32 if ending else torch.float8_e4m3fn
            gate_up = torch.cat([all_experts("gate_proj"), all_experts("up_proj")], dim=1)
            stacked[f"{stem}.gate_up_proj{ending}"] = gate_up.view(kind)
            stacked[f"{stem}.down_proj{ending}"] = all_experts("down_proj").view(kind)
    for file in fp8.glob("*.safetensors*"):
        file.unlink()
    save_file({name: value.contiguous() for name, value in stacked.items()}, fp8 / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(logits(fp8, dtype="float32"), separate, strict=True))


def test_one_quantised_layer_beside_an_unquantised_one_is_read(gptq, tmp_path):
    """Tools leave single layers out; a layer's records say how it is stored."""
    source = load_file(gptq.parent / "source" / "model.safetensors")
    for name in [name for name in open_checkpoint(gptq).tensors if "layers.1.block_sparse_moe.experts." in name]:
        change(gptq, name, None)
    for name, value in source.items():
        if "layers.1.block_sparse_moe.experts." in name:
            change(gptq, name, lambda _, value=value: value)
    first, second = map_experts(ModelFolder(gptq).empty_model(), open_checkpoint(gptq).tensors)
    assert first.layout.record.matrices
    assert not second.layout.record.matrices
    found = logits(gptq, dtype="float32")
    packed = logits(pack_model(gptq, tmp_path / "packed").folder, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(found, packed, strict=True))


def test_values_do_not_depend_on_how_many_rows_are_made_at_a_time():
    name, weight = "weight", torch.randn(2200, 130, generator=torch.Generator().manual_seed(0))
    pieces, expected = fp8_quantiser()(name, weight)
    pieces = {ending: pieces[f"{name}{ending}"] for ending in ("", "_scale_inv")}
    found = values(pieces, QuantizationScheme("fp8"), tuple(weight.shape), torch.float64)
    assert torch.equal(found, expected)


def test_symmetric_zero_points_are_eight_whichever_way_they_are_stored():
    rng = np.random.default_rng(0)
    pieces = {
        ".qweight": torch.from_numpy(rng.integers(-(2**31), 2**31, (8, 16)).astype(np.int32)),
        ".scales": torch.ones(2, 16, dtype=torch.float16),
    }
    scheme = read_scheme({**GPTQ, "sym": True}, "model")
    for word in (0x77777777, 0x88888888):
        pieces[".qzeros"] = torch.from_numpy(np.full((2, 2), word, np.uint32).view(np.int32))
        assert (in_format(pieces, scheme, (16, 64), "weight")["weight_zero"] == 8).all()
    asymmetric = scheme._replace(symmetric=False)
    assert (in_format(pieces, asymmetric, (16, 64), "weight")["weight_zero"] == 9).all()


@pytest.mark.parametrize(
    ("group_size", "stored"), [(32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (256, 128), (-1, 128)]
)
def test_groups_are_cut_into_groups_of_a_format(group_size, stored):
    assert QuantizationScheme("awq", group_size).format == f"int4-g{stored}"
