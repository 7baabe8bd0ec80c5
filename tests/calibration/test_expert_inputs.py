"""What experts see on calibration tokens, and that GPTQ makes something of it."""

import pytest
import torch
import torch.nn.functional as F

from moeflow import load_moe
from moeflow.calibration.expert_inputs import record_inputs
from moeflow.convert.quantize import quantize_model
from moeflow.errors import ConfigError

WINDOWS = torch.randint(1, 128, (12, 40), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def inputs(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="25%")
    yield record_inputs(model, WINDOWS)
    model.moeflow.close()


def test_every_matrix_gets_the_rows_that_are_routed_to_its_expert(mixtral, inputs):
    seen = []
    handle = mixtral.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        mixtral(torch.tensor(WINDOWS))
    handle.remove()
    ((hidden_states, top_k_index, _),) = seen
    experts = mixtral.model.layers[1].mlp.experts
    for expert in (0, 5):
        weights = {"gate_up_proj": experts.gate_up_proj[expert], "down_proj": experts.down_proj[expert]}
        expected = hidden_states[(top_k_index == expert).any(-1)]
        assert len(expected) > 40
        found = inputs.inputs(1, expert, "gate_up_proj", weights)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gate, up = F.linear(expected, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        found = inputs.inputs(1, expert, "down_proj", weights)
        torch.testing.assert_close(found, F.silu(gate) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gptq_moves_the_models_outputs_less_than_rounding_does(mixtral, mixtral_folder, inputs, tmp_path):
    ids, errors = torch.tensor(WINDOWS), {}
    with torch.no_grad():
        expected = mixtral(ids).logits
        for method in ("rtn", "gptq"):
            calibration = inputs if method == "gptq" else None
            quantize_model(mixtral_folder, tmp_path / method, "int3-g32", method=method, calibration=calibration)
            model = load_moe(tmp_path / method)
            errors[method] = (model(ids).logits - expected).norm().item()
            model.moeflow.close()
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_gptq_without_calibration_is_refused(mixtral_folder, tmp_path):
    with pytest.raises(ConfigError, match="calibration"):
        quantize_model(mixtral_folder, tmp_path / "out", "int4", method="gptq")
    assert not (tmp_path / "out").exists()
