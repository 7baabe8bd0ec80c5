"""One expert at a time, transformers' own conversion gives the weights that from_pretrained puts into the module."""

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow.errors import CheckpointError
from moeflow.hf import experts_interface
from moeflow.hf.eager.weights import EagerWeights
from moeflow.hf.model_folder import ModelFolder

KINDS = ("mixtral", "gpt_oss", "aria", "ernie4_5_vl_moe", "qwen3_vl_moe", "granitemoe", "nemotron_h", "deepseek_v3")


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_whole_module(name, tmp_path):
    model = build_model(FAMILIES[name])
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    weights = EagerWeights(ModelFolder(tmp_path), torch.float32)
    for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):
        for expert in range(module.num_experts):
            found = weights.read(layer, expert)
            assert found.keys() == {name for name, value in module._parameters.items() if value is not None}
            for parameter, value in found.items():
                assert torch.equal(value, getattr(module, parameter)[expert])
    weights.close()


def test_a_checkpoint_without_an_expert_is_refused(mixtral_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in mixtral_folder.glob("*.safetensors"):
        tensors |= load_file(file)
    kept = {name: value for name, value in tensors.items() if "layers.1.block_sparse_moe.experts" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((mixtral_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"feeds model\.layers\.1\.mlp\.experts\."):
        EagerWeights(ModelFolder(tmp_path), torch.float32)
