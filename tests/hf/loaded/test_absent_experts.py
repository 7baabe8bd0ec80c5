"""Experts that stay on disk: nothing saves, copies, changes or adapts them in silence, and all else works."""

import copy
import io
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.errors import ConfigError

IDS = torch.arange(3, 12)[None]
NAME = "model.layers.0.mlp.experts.gate_up_proj"
REFUSED = r"model\.layers\.\d\.mlp\.experts\.\S+ is not in memory.*moeflow pack"


@pytest.fixture
def model(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="50%", device="cpu", dtype=torch.float32)
    with model.moeflow, torch.no_grad():
        yield model


@pytest.fixture
def experts(model):
    return model.model.layers[0].mlp.experts


def test_no_way_of_saving_writes_a_model_without_experts(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    for save in (
        lambda: torch.save(model.state_dict(), tmp_path / "pickled"),
        lambda: torch.save(model, tmp_path / "pickled"),
        lambda: save_model(model, tmp_path / "model.safetensors"),
        lambda: save_file(model.state_dict(), tmp_path / "model.safetensors"),
        lambda: accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate"),
        lambda: model.save_pretrained(tmp_path / "copy"),
        lambda: model.push_to_hub("me/copy"),
    ):
        with pytest.raises(ConfigError, match=REFUSED):
            save()
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
        torch.load(tmp_path / "pickled")


def test_copies_and_pickles_of_model_layer_and_runtime_are_refused(model):
    for make in (copy.deepcopy, pickle.dumps, lambda found: torch.save(found, io.BytesIO())):
        for found in (model, model.model.layers[0], model.state_dict()):
            with pytest.raises(ConfigError, match=REFUSED):
                make(found)
        with pytest.raises(ConfigError, match="neither copied nor pickled"):
            make(model.moeflow)
    assert torch.equal(copy.copy(model)(IDS).logits, model(IDS).logits)


def test_reading_writing_and_training_the_weights_is_refused(model, experts):
    absent = model.state_dict()[NAME]
    assert (absent.shape, absent.dtype, absent.requires_grad) == ((8, 192, 64), torch.float32, False)
    absent.requires_grad = False
    assert NAME in repr(absent)
    for act in (
        lambda: experts.gate_up_proj,
        lambda: setattr(experts, "gate_up_proj", torch.nn.Parameter(torch.zeros(8, 192, 64))),
        lambda: setattr(experts, "gate_up_proj", torch.zeros(8, 192, 64)),
        lambda: experts.requires_grad_(True),
        lambda: setattr(absent, "requires_grad", True),
        lambda: absent + 1,
        lambda: absent.mul_(2),
        lambda: absent.cpu(),
        lambda: absent.data,
        lambda: absent.numpy(),
        lambda: absent[0],
        lambda: absent.data_ptr(),
        lambda: torch.stack([absent]),
        lambda: torch.zeros(8, 192, 64).copy_(absent),
        lambda: torch.add(IDS, 1, out=absent),
        lambda: torch.nn.functional.linear(torch.zeros(64), absent),
    ):
        with pytest.raises(ConfigError, match=REFUSED):
            act()


def test_weights_for_experts_are_not_taken_in_silence(model, mixtral):
    weights = mixtral.state_dict()
    for strict in (True, False):
        with pytest.raises(ConfigError, match=REFUSED):
            model.load_state_dict(weights, strict=strict)
        with pytest.raises(ConfigError, match=r"experts\.3\.w1\.lora_A"):
            model.load_state_dict(
                {"model.layers.1.mlp.experts.3.w1.lora_A.default.weight": torch.ones(2, 64)}, strict=strict
            )
    before = model(IDS).logits
    model.load_state_dict({name: value for name, value in weights.items() if ".experts." not in name})
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS).logits, before)


def test_what_a_model_without_those_parameters_could_do_it_still_can(model):
    dense = [name for name, _ in model.named_parameters()]
    assert not any(".experts." in name for name in dense)
    num_values = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == num_values
    assert model.get_memory_footprint(return_buffers=False) == 4 * num_values
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    torch.optim.SGD(model.parameters(), 0.1)
    before = model(IDS).logits
    model.requires_grad_(False).to("cpu", torch.float32)
    found = torch.func.functional_call(model, dict(model.named_parameters()), (IDS,)).logits
    assert torch.equal(found, before)


def test_a_second_model_of_the_same_config_computes(model):
    second = AutoModelForCausalLM.from_config(model.config)
    assert second.config._experts_implementation not in (None, "moeflow")
    assert second(IDS).logits.isfinite().all()


@pytest.fixture
def adapted(mixtral_folder, tmp_path):
    """Save a LoRA of the model with these targets, and return its folder and the logits with it."""
    peft = pytest.importorskip("peft")

    def adapted(**targets):
        torch.manual_seed(1)
        plain = AutoModelForCausalLM.from_pretrained(mixtral_folder, dtype=torch.float32)
        made = peft.get_peft_model(plain, peft.LoraConfig(r=2, init_lora_weights=False, **targets)).eval()
        made.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", made(IDS).logits

    return adapted


def test_an_adapter_of_attention_computes_and_is_saved(model, adapted, tmp_path):
    peft = pytest.importorskip("peft")
    folder, expected = adapted(target_modules=["q_proj", "v_proj"])
    found = peft.PeftModel.from_pretrained(model, folder)
    torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    found.load_adapter(folder, adapter_name="second")
    found.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again, first = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "again", folder))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_transformers_own_adapters_compute_and_are_saved(model, adapted, tmp_path):
    folder, expected = adapted(target_modules=["q_proj", "v_proj"])
    model.load_adapter(str(folder))
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    ],
    ids=["w1", "all-linear", "target_parameters", "modules_to_save"],
)
def test_an_adapter_of_experts_is_refused_by_name(model, adapted, targets):
    peft = pytest.importorskip("peft")
    folder, _ = adapted(**targets)
    with pytest.raises(ConfigError, match=REFUSED):
        peft.PeftModel.from_pretrained(model, folder)
    with pytest.raises(ConfigError, match=REFUSED):
        model.load_adapter(str(folder), adapter_name="again")


def test_a_wrapped_parameter_of_experts_is_refused(model):
    """What PEFT does with target_parameters, where it is not installed: it asks each module for its own."""
    found = {
        f"{path}.{name}" for path, module in model.named_modules() for name, _ in module.named_parameters(recurse=False)
    }
    assert NAME in found
    with pytest.raises(ConfigError, match=REFUSED):
        getattr(model.get_submodule(NAME.rpartition(".")[0]), "gate_up_proj")  # noqa: B009


def test_a_folder_with_an_adapter_is_refused_with_both_ways_to_load_it(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*load_adapter"):
        load_moe(tmp_path, device="cpu", expert_memory="50%")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"org/base.*load_adapter"):
        load_moe(tmp_path, device="cpu", expert_memory="50%")
