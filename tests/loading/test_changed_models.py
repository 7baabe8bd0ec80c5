"""What callers change on a loaded model: device, dtype, implementation. It runs right or says what is wrong."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.errors import ConfigError

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


@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.0", "model.layers.1.self_attn", "model.norm"])
def test_parts_on_another_device_are_told(model, name, num_tokens):
    model.get_submodule(name).to("meta")
    with pytest.raises((ConfigError, RuntimeError), match=r"on meta, its input on cpu|device meta"):
        model(torch.arange(num_tokens)[None])


@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_weights_that_lie_otherwise_compute_the_same(model, num_tokens):
    ids = torch.arange(num_tokens)[None]
    expected = model(ids).logits
    for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.norm"):
        part = model.get_submodule(name)
        part.weight = torch.nn.Parameter(part.weight.repeat_interleave(2, -1)[..., ::2], requires_grad=False)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:, :-3].contiguous(), requires_grad=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(ids)


@pytest.mark.parametrize("num_experts", [64, 66])
def test_a_token_may_have_more_experts_than_its_kernel_takes(tmp_path, num_experts):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 70, "num_experts_per_tok": num_experts}
    tiny_mixtral(**sizes).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    model = load_moe(tmp_path, device="cpu", dtype=torch.float32)
    with model.moeflow, torch.no_grad():
        for ids in (IDS[:, :1], IDS):
            torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_negative_expert_is_refused_and_a_huge_one_is_none(model, num_tokens):
    experts = model.model.layers[0].mlp.experts
    routes, weights = torch.zeros(num_tokens, 2, dtype=torch.int64), torch.ones(num_tokens, 2)
    x = torch.ones(num_tokens, 64)
    with pytest.raises(ConfigError, match="routed to expert -1"):
        experts(x, routes - 1, weights)
    none = experts(x, torch.stack((routes[:, 0], routes[:, 1] + 10**12), 1), weights)
    assert torch.equal(none, experts(x, torch.stack((routes[:, 0], routes[:, 1] + 8), 1), weights))


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
