"""OffloadedExperts behind a model: steps before it, outputs of another source, and what it refuses."""

import pytest
import torch

from moeflow import load_moe
from moeflow.hf import experts_interface

PROMPT = torch.arange(1, 12).unsqueeze(0)


@pytest.fixture
def model(mixtral_folder):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="50%", predictor=None)
    yield model
    model.moeflow.close()


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def layers(model):
    return [module._moeflow for _, module in experts_interface.experts_modules(model)]


class SeenRoutes:
    """Keeps the routes of every layer of a pass."""

    def __init__(self):
        self.routes = []

    def begin_pass(self, begun):
        self.routes.clear()

    def observe(self, layer, top_k_index, top_k_weights, hidden_states):
        self.routes.append((top_k_index.clone(), top_k_weights.clone()))

    def close(self):
        pass


def test_steps_change_the_routes_in_order_before_observers_and_experts_see_them(model):
    expected, calls, seen = logits(model), [], SeenRoutes()
    model.moeflow.observers.append(seen)

    def swap(hidden_states, top_k_index, top_k_weights, *, num_experts):
        calls.append(num_experts)
        return top_k_index.flip(1), top_k_weights.flip(1)

    def drop_all(hidden_states, top_k_index, top_k_weights, *, num_experts):
        return torch.full_like(top_k_index, num_experts), torch.zeros_like(top_k_weights)

    for one in layers(model):
        one.use(before=[swap, swap])
    assert torch.equal(logits(model), expected)
    assert calls == [8] * 2 * len(layers(model))
    for one in layers(model):
        one.use(before=[swap, drop_all])
    model.moeflow.reset_stats()
    logits(model)
    assert all((experts == 8).all() for experts, _ in seen.routes)
    assert model.moeflow.stats()["prefill"]["misses"] == 0


def test_outputs_of_another_source_are_weighed_and_summed_like_its_own(model):
    expected = logits(model)

    def run_here(one):
        def outputs(hidden_states, top_k_index, dtype):
            rows = hidden_states.repeat_interleave(top_k_index.shape[1], 0)
            return one.run_rows(rows, top_k_index.flatten()).to(dtype)

        return outputs

    steps = []
    for one in layers(model):
        one.use(before=[lambda hidden, index, weights, num_experts: steps.append(index) or (index, weights)])
        one.use(outputs_of=run_here(one))  # which leaves the step where it is
    assert torch.equal(logits(model), expected)
    assert len(steps) == len(layers(model))


def test_no_token_is_no_demand(model):
    one = layers(model)[0]
    with torch.no_grad():
        empty = one(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert empty.shape == (0, 64)
