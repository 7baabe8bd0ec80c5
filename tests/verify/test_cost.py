"""The cost of another folder's experts is what replacing them by hand costs."""

import copy

import pytest
import torch

from moeflow.convert.quantize import quantize_model
from moeflow.core import ExpertKey
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.model_folder import ModelFolder
from moeflow.verify.cost import measure_cost
from moeflow.verify.verify import load_for_passes


@pytest.fixture(scope="module")
def int3(mixtral_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("int3") / "model"
    return quantize_model(mixtral_folder, out, "int3-g32", method="rtn").folder


@torch.no_grad()
def by_hand(mixtral, int3, rows, layers):
    """KL divergence and top-1 agreement of transformers' model with these layers' experts as the folder has them."""
    changed = copy.deepcopy(mixtral)
    loaded = load_for_passes(ModelFolder(int3))
    with loaded.moeflow as runtime:
        stored = StoredWeights(runtime.store, torch.float32, experts_interface.transposed(loaded))
        for layer in layers:
            module = changed.model.layers[layer].mlp.experts
            for expert in range(8):
                for name, value in stored.read(*ExpertKey(layer, expert)).items():
                    getattr(module, name)[expert] = value
    tokens = torch.tensor(rows)
    exact, found = (model(tokens).logits.log_softmax(-1) for model in (mixtral, changed))
    divergence = (exact.exp() * (exact - found)).sum(-1).mean()
    return float(divergence), float((exact.argmax(-1) == found.argmax(-1)).float().mean())


def test_cost_is_what_replacing_the_experts_costs(mixtral, mixtral_folder, int3, rows):
    cost = measure_cost(mixtral_folder, int3, text=rows)
    assert (cost.divergence, cost.top1) == pytest.approx(by_hand(mixtral, int3, rows, range(3)), rel=1e-3)
    assert cost.divergence > 0.01
    assert cost.top1 < 1
    for layer in cost.layers:
        expected = by_hand(mixtral, int3, rows, [layer.layer])
        assert (layer.divergence, layer.top1) == pytest.approx(expected, rel=1e-3)


def test_the_report_names_the_layers_that_lose_most_first(mixtral_folder, int3, rows):
    cost = measure_cost(mixtral_folder, int3, text=rows)
    worst = max(cost.layers, key=lambda layer: layer.divergence)
    assert str(cost).splitlines()[1].startswith(f"  layer {worst.layer}: KL")
    assert [layer.path for layer in cost.layers] == [f"model.layers.{n}.mlp.experts" for n in range(3)]


def test_the_same_experts_cost_nothing(mixtral_folder, rows):
    cost = measure_cost(mixtral_folder, mixtral_folder, text=rows)
    assert cost.divergence == 0
    assert cost.top1 == 1
    assert all(layer.divergence == 0 and layer.top1 == 1 for layer in cost.layers)


def test_a_folder_of_another_model_is_refused(mixtral_folder, rows, tmp_path):
    from helpers.small_models import tiny_mixtral

    tiny_mixtral(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="it has 2 layers of experts, the model 3"):
        measure_cost(mixtral_folder, tmp_path, text=rows)
