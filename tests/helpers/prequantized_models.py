"""Small quantised models on disk: how each is made, changed, read and run."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.prequantized_checkpoints import (
    fp8_quantiser,
    int4_quantiser,
    is_linear,
    mxfp4_quantiser,
)
from moeflow import load_moe
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey
from moeflow.dtypes import TORCH_DTYPES
from moeflow.hf import pretrained
from moeflow.hf.config_file import load_config
from moeflow.hf.expert_sources import map_experts

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
    return ExpertStore(checkpoint.files, map_experts(pretrained.empty_model(load_config(folder)), checkpoint.tensors))


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
