"""Checkpoints that are quantised already: every bit of their experts counts, and every way they can be bad is named."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.prequantized_checkpoints import (
    fp8_quantiser,
    int4_quantiser,
    is_linear,
    make,
    mxfp4_quantiser,
    tiny_model,
)
from moeflow import load_moe
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.prequantized import QuantizationScheme, read_scheme
from moeflow.checkpoint.prequantized_values import in_format, values
from moeflow.checkpoint.store import ExpertStore
from moeflow.convert.pack import pack_model
from moeflow.core import ExpertKey
from moeflow.dtypes import TORCH_DTYPES
from moeflow.errors import CheckpointError, ExpertReadError, UnsupportedModelError
from moeflow.hf import pretrained
from moeflow.hf.expert_sources import expert_tensor_names, map_experts
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.loading.describe import describe_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
PROMPT = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def is_stacked_expert(name):
    return name.endswith(("gate_up_proj", "down_proj"))


class Case(NamedTuple):
    """A family, its sizes, and how its checkpoint is quantised."""

    family: str
    sizes: dict
    quantization: dict
    quantise: object
    is_quantised: object = is_linear
    format: str = "int4-g32"


CASES = {
    "mxfp4, gpt-oss": Case("gpt_oss", {}, {"quant_method": "mxfp4"}, mxfp4_quantiser, is_stacked_expert, "mxfp4"),
    "fp8, qwen3": Case("qwen3_moe", {"hidden": 128, "intermediate": 256}, FP8, fp8_quantiser(), format="fp8"),
    "fp8, padded, bfloat16 scales, deepseek": Case(
        "deepseek_v3", {"intermediate": 128}, FP8, fp8_quantiser(torch.bfloat16), format="fp8"
    ),
    "gptq, mixtral": Case("mixtral", {}, GPTQ, int4_quantiser("gptq", 32, zero_offset=1)),
    "gptq version 2, no g_idx": Case(
        "mixtral", {}, {**GPTQ, "checkpoint_format": "gptq_v2"}, int4_quantiser("gptq", 32, g_idx=False)
    ),
    "gptq, one group a row, deepseek": Case(
        "deepseek_v3", {}, {**GPTQ, "group_size": -1}, int4_quantiser("gptq", -1, zero_offset=1), format="int4-g128"
    ),
    "awq, qwen3": Case("qwen3_moe", {}, AWQ, int4_quantiser("awq", 32)),
    "awq, groups of 96": Case(
        "mixtral", {"hidden": 96, "intermediate": 192}, {**AWQ, "group_size": 96}, int4_quantiser("awq", 96)
    ),
}


class Made(NamedTuple):
    """A case on disk: the quantised folder, the plain one, and the values of what is quantised in float64."""

    native: Path
    plain: Path
    exact: dict
    format: str


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    torch.set_num_threads(1)
    case = CASES[request.param]
    model = tiny_model(case.family, **case.sizes)
    folders = make(tmp_path_factory.mktemp("case"), model, case.quantization, case.quantise, case.is_quantised)
    return Made(*folders, case.format)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders that tests copy before they damage them, with their unquantised source beside them."""
    found = {}
    for name in ("gptq, mixtral", "fp8, qwen3"):
        case, folder = CASES[name], tmp_path_factory.mktemp("original")
        make(folder, tiny_model(case.family, **case.sizes), case.quantization, case.quantise, is_linear)
        found[case.quantization["quant_method"]] = folder
    return found


@pytest.fixture
def gptq(originals, tmp_path):
    """A GPTQ Mixtral that a test may damage."""
    return shutil.copytree(originals["gptq"], tmp_path / "gptq") / "native"


@pytest.fixture
def fp8(originals, tmp_path):
    """A FP8 Qwen3-MoE that a test may damage."""
    return shutil.copytree(originals["fp8"], tmp_path / "fp8") / "native"


def change(folder, name, new):
    """Replace, add or (None) remove one tensor of a sharded checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"].setdefault(name, min(index["weight_map"].values()))
    tensors = load_file(folder / shard)
    if new is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = new(tensors.get(name)).contiguous()
    save_file(tensors, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def open_store(folder):
    checkpoint = open_checkpoint(folder)
    return ExpertStore(
        checkpoint.files, map_experts(pretrained.empty_model(pretrained.load_config(folder)), checkpoint.tensors)
    )


def read_expert(store, layer, expert):
    """Return an expert's stored tensors by name."""
    record = store.layers[layer].layout.record
    raw = np.zeros(record.num_bytes, np.uint8)
    store.read(ExpertKey(layer, expert), raw)
    return {
        spec.name: torch.from_numpy(raw[spec.offset : spec.offset + spec.num_bytes])
        .view(TORCH_DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in record.tensors
    }


def expected_matrices(exact, layer_name, expert):
    """Return an expert's matrices as [out, in] from the values the checkpoint was made of."""
    number = layer_name.split(".")[2]
    mine = {name: value for name, value in exact.items() if f"layers.{number}." in name and ".experts" in name}
    if any(name.endswith("gate_up_proj") for name in mine):
        return {name.rpartition(".")[2]: value[expert].T for name, value in mine.items()}
    mine = {name.partition(f".experts.{expert}.")[2]: value for name, value in mine.items()}
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if "gate_proj.weight" in mine else ("w1", "w3", "w2")
    return {
        "gate_up_proj": torch.cat([mine[f"{gate}.weight"], mine[f"{up}.weight"]]),
        "down_proj": mine[f"{down}.weight"],
    }


def logits(folder, **options):
    model = load_moe(folder, predictor=None, **options)
    with torch.no_grad():
        found = model(PROMPT).logits, model(PROMPT[:1, :1]).logits
    model.moeflow.close()
    return found


def plain_logits(folder, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        return model.eval()(PROMPT).logits, model(PROMPT[:1, :1]).logits


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


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
    caller = pretrained.load_config(made.native)
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
    feeding = expert_tensor_names(pretrained.empty_model(pretrained.load_config(made.native)), tensors)
    assert feeding == {name for name in tensors if ".experts." in name}


@pytest.mark.slow
def test_packed_folder_gives_the_same_bits(made, tmp_path):
    packed = pack_model(made.native, tmp_path / "packed")
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
    first, second = map_experts(pretrained.empty_model(pretrained.load_config(gptq)), open_checkpoint(gptq).tensors)
    assert first.layout.record.matrices
    assert not second.layout.record.matrices
    found = logits(gptq, dtype="float32")
    packed = logits(pack_model(gptq, tmp_path / "packed"), dtype="float32")
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


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised with bitsandbytes"),
        ({}, "quantised with None"),
        ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({**FP8, "weight_block_size": None}, r"weight_block_size=\[\]"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme='static'"),
        ({**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
        ({**GPTQ, "bits": 8}, "bits=8"),
        ({**GPTQ, "group_size": 16}, "group_size=16"),
        ({**GPTQ, "desc_act": True}, "desc_act=True"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic="),
        ({**AWQ, "version": "gemv"}, "version='gemv'"),
        ({**AWQ, "zero_point": False}, "zero_point=False"),
        ({**AWQ, "bits": 3}, "bits=3"),
    ],
)
def test_what_is_not_read_is_refused_by_name(gptq, quantization, message):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_moe(gptq)


@pytest.mark.parametrize("piece", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("matrix", ["block_sparse_moe.experts.2.w1", "self_attn.q_proj"])
def test_missing_piece_is_named(gptq, matrix, piece):
    name = f"model.layers.1.{matrix}.{piece}"
    change(gptq, name, None)
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_moe(gptq)


def test_missing_fp8_scale_and_weight_are_named(fp8):
    whole = fp8.with_name("whole")
    shutil.copytree(fp8, whole)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    change(fp8, f"{name}_scale_inv", None)
    with pytest.raises(CheckpointError, match=f"lacks {name}_scale_inv"):
        load_moe(fp8)
    change(whole, name, None)
    with pytest.raises(CheckpointError, match=f"lacks {name},"):
        load_moe(whole)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("block_sparse_moe.experts.0.w2.scales", lambda old: old[:-1]),
        ("block_sparse_moe.experts.0.w2.scales", lambda old: old.float()),
        ("block_sparse_moe.experts.0.w2.qzeros", lambda old: old[:, :-1]),
        ("block_sparse_moe.experts.0.w2.qweight", lambda old: old[:-1]),
        ("block_sparse_moe.experts.0.w2.g_idx", lambda old: old[:-1]),
        ("self_attn.k_proj.qweight", lambda old: old.long()),
    ],
)
def test_piece_of_another_shape_or_dtype_is_named(gptq, name, new):
    change(gptq, f"model.layers.0.{name}", new)
    stem = name.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=f"model.layers.0.{stem}"):
        load_moe(gptq)


def test_matrix_of_another_model_is_named(gptq):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \[256, 64\].*\[96, 64\]"):
        load_moe(gptq)


def test_dense_matrix_of_another_model_is_named(gptq):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4, "head_dim": 32}))
    with pytest.raises(CheckpointError, match=r"k_proj.*\[128, 64\].*\[32, 64\]"):
        load_moe(gptq)


def test_scale_that_is_no_number_stops_its_expert_alone(gptq):
    def spoil(old):
        old[0, 3] = torch.inf
        return old

    change(gptq, "model.layers.1.block_sparse_moe.experts.2.w1.scales", spoil)
    store = open_store(gptq)
    read_expert(store, 1, 1)
    with pytest.raises(ExpertReadError, match=r"expert 2 of model\.layers\.1.*a scale is NaN or infinite"):
        read_expert(store, 1, 2)
    store.close()


def test_groups_in_another_order_are_refused_whatever_the_config_says(gptq):
    change(gptq, "model.layers.0.block_sparse_moe.experts.0.w1.g_idx", lambda old: old.flip(0))
    store = open_store(gptq)
    with pytest.raises(ExpertReadError, match=r"expert 0 .*g_idx"):
        read_expert(store, 0, 0)
    store.close()


def test_dense_groups_in_another_order_are_refused(gptq):
    change(gptq, "model.layers.0.self_attn.q_proj.g_idx", lambda old: old.flip(0))
    with pytest.raises(CheckpointError, match=r"q_proj.*g_idx"):
        load_moe(gptq)


def test_expert_quantised_in_part_is_refused(gptq):
    stem = "model.layers.0.block_sparse_moe.experts.1.w1"
    for piece in ("qweight", "qzeros", "scales", "g_idx"):
        change(gptq, f"{stem}.{piece}", None)
    change(gptq, f"{stem}.weight", lambda _: torch.zeros(96, 64))
    with pytest.raises(UnsupportedModelError, match="quantised in part"):
        load_moe(gptq)


def test_fp8_gate_that_ends_inside_a_block_is_refused(tmp_path):
    model = tiny_model("qwen3_moe", hidden=128, intermediate=96)
    native, _, _ = make(tmp_path, model, FP8, fp8_quantiser(), is_linear)
    with pytest.raises(UnsupportedModelError, match="multiples of 128"):
        load_moe(native)


def test_zero_biases_that_some_tools_write_are_passed_over(gptq):
    for name in ("self_attn.q_proj.bias", "block_sparse_moe.experts.0.w1.bias"):
        change(gptq, f"model.layers.0.{name}", lambda _: torch.zeros(64, dtype=torch.float16))
    model, info = load_moe(gptq, predictor=None, output_loading_info=True)
    assert not info["unexpected_keys"]
    model.moeflow.close()
