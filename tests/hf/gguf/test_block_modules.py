"""Dense weights in blocks behave as weights: they are read, saved and moved, and what would change them is refused."""

import pytest
import torch

from helpers.small_gguf import write_small
from moeflow import load_moe
from moeflow.errors import ConfigError
from moeflow.hf.gguf.block_modules import BlockLinear

IDS = torch.arange(5, 16)[None]


@pytest.fixture
def model(gguf_file):
    model = load_moe(gguf_file, device="cpu", dtype="float32", predictor=None)
    with model.moeflow:
        yield model


def test_a_state_dict_has_the_values(model):
    weight = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert type(weight) is torch.Tensor
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.__setitem__(0, 1),
        lambda layer: setattr(layer.weight, "data", torch.zeros(256, 256)),
        lambda layer: layer.load_state_dict({"weight": torch.zeros(256, 256)}),
    ],
)
def test_a_change_that_would_be_lost_is_refused(change, model):
    with torch.no_grad(), pytest.raises(ConfigError, match="kept in the blocks of its GGUF file"):
        change(model.model.layers[0].self_attn.q_proj)


def test_another_dtype_is_followed(model):
    with torch.no_grad():
        expected = model(IDS).logits
        assert isinstance(model.lm_head, BlockLinear)
        found = model.bfloat16()(IDS).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=float(0.05 * expected.abs().max()))


def test_saving_is_refused_with_what_to_do(model, tmp_path):
    with pytest.raises(ConfigError, match="use moeflow pack or moeflow quantize"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_adapter_computes_and_is_not_merged(tmp_path):
    peft = pytest.importorskip("peft")
    file, plain = write_small(tmp_path / "model")
    targets = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    made = peft.get_peft_model(plain, peft.LoraConfig(**targets)).eval()
    made.save_pretrained(tmp_path / "adapter")
    model = load_moe(file, device="cpu", dtype="float32", predictor=None)
    with model.moeflow, torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        expected = made(IDS).logits
        torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-3, atol=float(1e-5 * expected.abs().max()))
        with pytest.raises(ConfigError, match="merge an adapter"):
            found.merge_and_unload()
