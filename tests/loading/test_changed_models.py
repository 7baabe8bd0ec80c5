"""What callers change on a loaded model: device, dtype, implementation. It runs right or says what is wrong."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow import load_moe
from moeflow.errors import ConfigError
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.library import instruction_set

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def model(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="50%", device="cpu")
    with model.moeflow, torch.no_grad():
        yield model


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_dense_weights_on_another_device_are_told(model, num_tokens):
    model.to("meta")
    with pytest.raises(ConfigError, match="on meta, its experts on cpu"):
        model(IDS[:, :num_tokens])


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_model_in_double_precision_computes_in_it(model, mixtral_folder, num_tokens):
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    expected = AutoModelForCausalLM.from_pretrained(mixtral_folder, **options).double()
    ids = IDS[:, :num_tokens]
    found = model.double()(ids).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(ids).logits, rtol=1e-9, atol=1e-9)


def test_dense_weights_follow_autocast_as_transformers_do(model, mixtral_folder):
    plain = AutoModelForCausalLM.from_pretrained(mixtral_folder, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model.lm_head(torch.ones(1, 64)), plain.lm_head(torch.ones(1, 64))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_another_implementation_is_refused_by_the_setter(model):
    before = model(IDS).logits
    with pytest.raises(ConfigError, match="no other implementation"):
        model.set_experts_implementation("eager")
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_another_implementation_in_the_config_changes_no_bit(model, name):
    before = [model(IDS).logits, model(IDS[:, :1]).logits]
    model.config._experts_implementation = name
    assert all(map(torch.equal, [model(IDS).logits, model(IDS[:, :1]).logits], before))


def test_the_implementation_by_name_says_that_load_moe_loads(mixtral_folder):
    other = AutoModelForCausalLM.from_pretrained(mixtral_folder, experts_implementation="moeflow")
    with pytest.raises(ConfigError, match="load_moe"):
        other(IDS)


@pytest.mark.parametrize("number", [0, -1])
def test_a_token_without_experts_is_refused_while_loading(mixtral_folder, number):
    with pytest.raises(ConfigError, match=f"num_experts_per_tok={number}"):
        load_moe(mixtral_folder, device="cpu", num_experts_per_tok=number)


@pytest.mark.skipif(instruction_set() is None, reason="moeflow was installed without a C++ compiler")
def test_the_kernel_of_one_token_refuses_no_experts():
    with pytest.raises((ConfigError, ValueError, RuntimeError, MemoryError), match="0 experts"):
        cpu.run_token(torch.ones(1, 64), [], [], torch.ones(1, 0), torch.empty(1, 64))
