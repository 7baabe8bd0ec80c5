"""What predictors, recorders and observers see of native steps is what they see of the model's own."""

import numpy as np
import pytest
import torch

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.kernels.cpu.library import instruction_set
from moeflow.trace.recorder import attach_recorder
from moeflow.trace.trace import RoutingTrace

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watching") / "model"
    tiny_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder):
    """Load the model; every one is closed after the test."""
    made = []

    def load(**options):
        options = {"expert_memory": "50%", "step": "auto", "device": "cpu", **options}
        made.append(load_moe(folder, **options))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


def answer(model, num_tokens=NUM_TOKENS):
    """Token ids that a model generates greedily, and the logits that it chose them by."""
    out = model.generate(
        PROMPT, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


class Signals:
    """Keeps what a predictor is shown, beside it."""

    def __init__(self, predictor):
        self.shown = []
        self._observe = predictor.observe
        predictor.observe = self

    def __call__(self, layer, experts, weights, signal=None):
        self.shown.append((layer, experts.copy(), weights.copy(), None if signal is None else signal.clone()))
        return self._observe(layer, experts, weights, signal)


def test_a_predictor_is_shown_what_it_sees_of_the_models_own_steps(load):
    shown = {}
    for step in ("python", "auto"):
        model = load(predictor="lookahead", step=step, expert_memory="30%")
        signals = Signals(model.moeflow.predictor)
        answer(model, 12)  # prediction is not timed yet, and stays on
        shown[step] = signals.shown
    assert model.moeflow.stats()["step"]["steps"] == 11
    assert len(shown["auto"]) == 11 * 3
    for own, native in zip(shown["python"], shown["auto"], strict=True):
        assert own[0] == native[0]
        np.testing.assert_array_equal(own[1], native[1])
        np.testing.assert_allclose(own[2], native[2], rtol=1e-5)
        torch.testing.assert_close(own[3], native[3], rtol=1e-5, atol=1e-5)


def test_a_predictor_changes_no_bit_and_all_steps_stay_native(load):
    expected = answer(load(expert_memory="100%", predictor=None))[1]
    for predictor, budget in (("lookahead", "20%"), ("ensemble", "60%")):
        model = load(expert_memory=budget, predictor=predictor)
        assert torch.equal(answer(model)[1], expected), predictor
        stats = model.moeflow.stats()
        assert stats["step"] == {"mode": "native", "reason": None, "steps": NUM_TOKENS - 1}
        assert stats["prediction"]["steps_on"] > 0
        assert stats["prediction"]["failure"] is None
        model.moeflow.check_integrity()


def test_a_trace_of_native_steps_is_that_of_the_models_own(load, tmp_path):
    traces = {}
    for step in ("python", "auto"):
        model = load(predictor=None, step=step)
        attach_recorder(model, tmp_path / step, lookahead=True)
        answer(model)
        model.moeflow.close()
        traces[step] = RoutingTrace.open(tmp_path / step)
    assert model.moeflow.step.num_steps == NUM_TOKENS - 1
    own, native = traces["python"], traces["auto"]
    for name in ("token_ids", "experts", "lookahead"):
        np.testing.assert_array_equal(getattr(own, name), getattr(native, name), err_msg=name)
    np.testing.assert_allclose(own.weights, native.weights, rtol=1e-2)
    assert (native.lookahead != native.format.none).any(axis=(1, 2, 3)).all()


def test_hooks_of_the_user_beside_those_of_a_tap_are_noticed(load):
    model = load(predictor="lookahead")
    _, expected = answer(model)
    steps, seen = model.moeflow.step.num_steps, []
    norm = model.model.layers[1].post_attention_layernorm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    _, logits = answer(model)
    hook.remove()
    assert len(seen) == NUM_TOKENS
    assert model.moeflow.step.num_steps == steps
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(answer(model)[1], expected)
    assert model.moeflow.step.num_steps == 2 * steps
