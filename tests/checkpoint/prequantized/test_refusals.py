"""Quantised checkpoints that are refused: each way they can be bad is named."""

import json
import shutil

import pytest
import torch

from helpers.prequantized_checkpoints import (
    fp8_quantiser,
    is_linear,
    make,
    tiny_model,
)
from helpers.prequantized_models import (
    AWQ,
    FP8,
    GPTQ,
    change,
    open_store,
    read_expert,
)
from moeflow import load_moe
from moeflow.errors import CheckpointError, ExpertReadError, UnsupportedModelError


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
