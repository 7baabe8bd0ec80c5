"""Where an expert's bytes come from: records hold the bits that transformers' own loading gives."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow.checkpoint.store import ExpertStore
from moeflow.convert.pack import pack_model
from moeflow.core import ExpertKey
from moeflow.dtypes import tensors_of
from moeflow.hf.experts_interface import experts_modules
from moeflow.hf.model_folder import ModelFolder

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def mix_dtypes(folder):
    """Store one tensor after another in another float dtype: experts differ, and so do one expert's matrices."""
    file, turns = folder / "model.safetensors", itertools.cycle(DTYPES)
    save_file({name: t.to(next(turns)) for name, t in sorted(load_file(file).items())}, file, {"format": "pt"})


def assert_experts_are_transformers(folder, reference):
    """Compare every record with the parameters of a model that transformers loaded, bit for bit."""
    opened = ModelFolder(folder)
    layers = opened.layers(opened.empty_model())
    store = ExpertStore(opened.expert_files, layers)
    for number, (source, (_, module)) in enumerate(zip(layers, experts_modules(reference), strict=True)):
        for expert in range(source.layout.num_experts):
            record = np.zeros(source.layout.record.num_bytes, np.uint8)
            store.read(ExpertKey(number, expert), record)
            for name, value in tensors_of(torch.from_numpy(record), source.layout.record).items():
                expected = getattr(module, name)[expert]
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected), (source.layout.name, expert, name)
    store.close()


# a tensor for each matrix of each expert; one for all experts; with a transpose; with an interleave
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_experts_of_different_float_dtypes_are_cast_as_transformers_casts_them(name, dtype, tmp_path):
    folder = tmp_path / "model"
    build_model(FAMILIES[name]).save_pretrained(folder)
    mix_dtypes(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_experts_are_transformers(folder, reference)
    assert_experts_are_transformers(pack_model(folder, tmp_path / "packed", lossless=False).folder, reference)
