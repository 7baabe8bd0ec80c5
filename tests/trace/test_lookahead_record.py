"""What a trace holds of lookahead is what the coming layers' routers say of this layer's residual stream."""

import numpy as np
import pytest
import torch

from helpers.small_models import tiny_mixtral
from moeflow.errors import TraceError
from moeflow.hf.passes.residual import ResidualTap, build_lookahead
from moeflow.loading.load_moe import load_moe
from moeflow.trace.format import DECODE
from moeflow.trace.recorder import attach_recorder
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import open_predictor

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
REACH, RANKS = 2, 4  # of a model with 3 layers and top-2
STRIDE = 2  # lookahead asks at every other layer


@pytest.fixture
def model(mixtral_folder):
    torch.set_num_threads(1)
    model = load_moe(mixtral_folder, device="cpu", expert_memory="50%")
    with model.moeflow:
        yield model


def generate(model, num_tokens=12):
    return model.generate(PROMPT, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)


def routers_asked_early(resident, ids):
    """Apply the later layers' norms and routers to every STRIDE-th layer's residual stream: [T, L, D, M] ids."""
    residuals, layers = [], resident.model.layers
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: residuals.append(args[0][0]))
        for layer in layers
    ]
    with torch.no_grad():
        resident(ids)
        for hook in hooks:
            hook.remove()
        said = np.full((ids.shape[1], len(layers), REACH, RANKS), 255)
        for layer, residual in list(enumerate(residuals))[::STRIDE]:
            for distance, later in enumerate(layers[layer + 1 : layer + 1 + REACH]):
                scores = later.post_attention_layernorm(residual) @ later.mlp.gate.weight.T
                said[:, layer, distance] = scores.argsort(-1, descending=True)[:, :RANKS]
    return said


def test_recorded_ids_are_what_the_routers_say_early(model, mixtral, tmp_path):
    attach_recorder(model, tmp_path / "t", lookahead=True)
    tokens = generate(model)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.format.lookahead == (REACH, RANKS)
    np.testing.assert_array_equal(trace.lookahead, routers_asked_early(mixtral, tokens[:, :-1]))


def test_replayed_ids_are_what_the_live_predictor_said(model, tmp_path):
    attach_recorder(model, tmp_path / "t", lookahead=True)
    live, tap, said = build_lookahead(model, 2), ResidualTap(model), []
    tap.listen(True)

    def ask(layer):
        def hook(module, args):
            hidden_states, index, _ = args
            live.step(None) if layer == 0 else None
            said.append(live.observe(layer, index.numpy(), None, tap.residual(layer, hidden_states)))

        return hook

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(ask(layer))
    generate(model)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    decoded = trace.experts[trace.phase == DECODE]
    recorded = trace.lookahead[trace.phase == DECODE]
    assert any(one is not None for one in said)
    live_said = iter(said[trace.num_layers :])  # the prompt's pass came first
    for row, experts in enumerate(decoded):
        replayed = open_predictor("lookahead", trace)[0]  # a new one, before it has learned what a rank is worth
        replayed.begin(1)
        for layer in range(trace.num_layers):
            then, now = next(live_said), replayed.observe(layer, experts[layer][None], None, recorded[row, layer][None])
            if then is None:
                assert now is None or np.isnan(now).all()
                continue
            likeliest = np.argsort(-then[0], axis=1, kind="stable")[:, :RANKS]
            np.testing.assert_array_equal(recorded[row, layer, : len(likeliest)], likeliest)
            assert [set(ids) for ids in np.argsort(-now[0])[:, :2]] == [set(ids) for ids in likeliest[:, :2]]


@pytest.mark.slow
def test_recording_lookahead_changes_no_bit_and_leaves_no_hook(model, mixtral_folder, tmp_path):
    expected = generate(model)
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    before = [len(norm._forward_hooks) for norm in norms]
    recorder = attach_recorder(model, tmp_path / "t", lookahead=True)
    assert torch.equal(generate(model), expected)
    recorder.close()
    assert [len(norm._forward_hooks) for norm in norms] == before


def test_a_trace_without_lookahead_is_not_appended_to_with_it(model, tmp_path):
    attach_recorder(model, tmp_path / "t").close()
    before = [len(block.post_attention_layernorm._forward_hooks) for block in model.model.layers]
    with pytest.raises(TraceError, match="lookahead is None there"):
        attach_recorder(model, tmp_path / "t", lookahead=True)
    assert [len(block.post_attention_layernorm._forward_hooks) for block in model.model.layers] == before


def test_a_model_of_one_layer_has_no_lookahead_to_record(tmp_path):
    tiny_mixtral(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    model = load_moe(tmp_path / "m", device="cpu", expert_memory="50%", predictor=None)
    with model.moeflow, pytest.raises(TraceError, match="several layers"):
        attach_recorder(model, tmp_path / "t", lookahead=True)
    assert not (tmp_path / "t").exists()
