"""OffloadedExperts behind a model: steps before it, outputs of another source, and what it refuses."""

import sys

import pytest
import torch

from moeflow import load_moe
from moeflow.core import ExpertKey
from moeflow.hf import experts_interface
from moeflow.kernels.cpu.library import instruction_set
from moeflow.offload.runtime import ExpertRuntime

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


def asked(one):
    """Return how often each expert of a layer was asked for, and in which order last."""
    cache, num_experts = one.runtime.cache, one.runtime.experts_per_layer[one.layer]
    uses = [cache.uses(ExpertKey(one.layer, expert)) for expert in range(num_experts)]
    last = cache._last_events[one.layer, :num_experts]
    return uses, last.argsort(kind="stable").tolist()


def calls_of(function, run):
    """Return how often a run entered a Python function."""
    entered = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code is function.__code__:
            entered.append(1)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(entered)


@pytest.mark.skipif(instruction_set() is None, reason="moeflow was installed without a C++ compiler")
@pytest.mark.parametrize("length", [1, 30])
def test_a_layer_with_all_its_experts_here_is_one_call_with_the_same_bits_and_counts(mixtral_folder, length):
    ids = torch.arange(1, 1 + length).unsqueeze(0)
    found = []
    for predictor in (None, "popularity"):  # a predictor asks to see each layer's routes
        with torch.no_grad():
            model = load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=predictor)
            first = model(PROMPT).logits, model(ids).logits
            model.moeflow.reset_stats()
            fetches = calls_of(ExpertRuntime.fetch, lambda model=model: model(ids))
            stats = model.moeflow.stats()["prefill"]
        counts = {name: stats[name] for name in ("forwards", "tokens", "hits", "misses", "hit_rate", "decisions")}
        assert stats["compute_s"] > 0
        found.append((first, counts, [asked(one) for one in layers(model)], fetches > 0))
        model.moeflow.close()
    whole, fetched = found
    assert all(torch.equal(a, b) for a, b in zip(whole[0], fetched[0], strict=True))
    assert whole[1:3] == fetched[1:3]
    assert (whole[3], fetched[3]) == (False, True)


@pytest.mark.parametrize("most_tokens", [1, 4, 11, 12])
def test_experts_of_a_long_pass_run_part_by_part_with_the_same_bits(model, most_tokens):
    expected, seen = logits(model), SeenRoutes()
    model.moeflow.most_tokens = most_tokens
    model.moeflow.reset_stats()
    model.moeflow.observers.append(seen)
    assert torch.equal(logits(model), expected)
    stats = model.moeflow.stats()["prefill"]
    parts = [part for index, _ in seen.routes for part in index.split(most_tokens)]
    assert stats["hits"] + stats["misses"] == sum(len(part.unique()) for part in parts)
