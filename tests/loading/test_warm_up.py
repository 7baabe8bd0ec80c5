"""The first pass on a GPU: measured as a prompt runs, without a trace in the model; where it fails, the model runs."""

import pytest
import torch

from helpers.counted_card import CountedCard
from helpers.families import FAMILIES
from helpers.family_models import build_model, inputs
from helpers.small_models import tiny_mixtral
from moeflow.hf import experts_interface
from moeflow.loading.gpu_memory import GpuMemory
from moeflow.loading.warm_up import WarmUp, warm_up

MIB = 1 << 20


@pytest.fixture
def card(monkeypatch):
    return CountedCard(monkeypatch, 1 << 30)


@pytest.fixture
def model():
    return tiny_mixtral(vocab_size=4096)


def measure(model, card, context):
    with card:
        return warm_up(model, GpuMemory(card.device), context)


def test_the_peak_grows_with_the_context_and_has_the_logits_of_one_token(model, card):
    short, long = (measure(model, card, context).peak_bytes for context in (64, 128))
    hidden = 128 * 64 * 4
    assert 4 * hidden < long < 128 * 4096 * 4 / 2, "at least queries, keys, values and a residual; not all logits"
    assert 1.5 * short < long
    assert card.cards.touched == {1}
    assert card.kept == card.memory_allocated(card.device), "what the pass took is given back"


def test_keys_and_values_are_not_in_the_peak(card):
    shallow, deep = (measure(tiny_mixtral(num_hidden_layers=count), card, 128).peak_bytes for count in (2, 6))
    assert shallow == deep


def test_what_stays_after_the_pass_is_not_counted(model, card):
    workspaces = []

    def work(*_):
        if not workspaces:
            workspaces.append(torch.zeros(MIB))

    hook = model.register_forward_hook(work)
    try:
        with_workspace = measure(model, card, 64).peak_bytes
    finally:
        hook.remove()
    assert with_workspace == measure(model, card, 64).peak_bytes
    assert card.memory_allocated(card.device) == 4 * MIB


def test_a_measured_model_is_as_it_was(model, card):
    tokens = torch.arange(8)[None]
    before, random = model(tokens).logits, torch.get_rng_state()
    assert measure(model, card, 64).failure is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(tokens).logits, before)


def test_no_expert_runs_and_no_position_beyond_the_models_is_asked_for(model, card):
    for _, module in experts_interface.experts_modules(model):
        for parameter in module.parameters():
            parameter.data = parameter.data[:0]  # as good as on disk
    assert measure(model, card, 4096) == WarmUp(256, measure(model, card, 256).peak_bytes)


@pytest.mark.parametrize("reason", ["a family's own input", "memory"])
def test_a_pass_that_fails_is_said_in_one_line_and_leaves_the_model(model, card, caplog, reason):
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    hook = None
    if reason == "memory":
        card.other_bytes = card.num_bytes - 40_000
        said = "OutOfMemoryError: CUDA out of memory. Tried to allocate much."
    else:
        said = "ValueError: pixels are missing"

        def refuse(*_):
            raise ValueError("pixels are missing\nsecond line")

        hook = model.model.layers[1].register_forward_pre_hook(refuse)
    warmed = measure(model, card, 64)
    if hook is not None:
        hook.remove()
    assert warmed == WarmUp(64, None, said)
    assert f"({said}): room for activations is an estimate" in caplog.text
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES)[::8])
@torch.no_grad()
def test_a_family_is_measured_and_as_it_was(card, name):
    family = FAMILIES[name]
    model = build_model(family)
    before = model(**inputs(family)).logits
    warmed = measure(model, card, 64)
    assert (warmed.failure, warmed.context) == (None, 64)
    assert warmed.peak_bytes > 0
    assert torch.equal(model(**inputs(family)).logits, before)
