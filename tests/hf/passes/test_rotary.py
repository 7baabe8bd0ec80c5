"""Rotary embeddings by sequence: which depend on the length, from where on, and that they are left as they were."""

import copy
import pickle

import pytest
import torch

from helpers.rope_models import ORIGINAL, ROPES, rope_model
from moeflow.engine.engine import Engine
from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes.forward import context_positions
from moeflow.hf.passes.rotary import SequenceRotaries, Span


def learnt(model):
    """Return the model's rotary embeddings after one packed pass."""
    rotaries = SequenceRotaries(model, context_positions(model))
    with torch.no_grad(), rotaries.running([Span(1, 1)]):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.zeros(1, 1, dtype=torch.long))
    rotaries.keep_dependent()
    return rotaries


@pytest.mark.parametrize("rope", ROPES)
def test_the_length_from_which_a_scaling_changes_is_found(rope):
    model = rope_model(rope)
    rotaries = learnt(model)
    names = [rotaries.scaling_of(length) for length in (1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL)]
    assert names[0] == names[1]
    if rope.startswith("longrope"):
        assert names[1] != names[2] == names[3]
    elif "dynamic" in str(ROPES[rope]):
        assert len(set(names)) == 3
    else:
        assert len(set(names)) == 1
        assert not any("forward" in module.__dict__ for module in model.modules()), "they are called as before"
    assert rotaries.restart == (ORIGINAL + 1 if rope == "longrope, cache dropped" else None)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_each_sequence_of_a_pass_is_scaled_as_alone_and_the_module_stays_as_it_was(rope):
    model = rope_model(rope)
    rotaries = learnt(model)
    alone, module = copy.deepcopy(model.model.rotary_emb), model.model.rotary_emb
    spans = [Span(1, 40), Span(3, 10), Span(2, 60), Span(1, ORIGINAL), Span(2, 40)]
    pieces = [torch.arange(span.length - span.num_new, span.length)[None] for span in spans]
    pieces[4] = torch.arange(7, 9)[None]  # of a prompt of 40
    before, hidden = copy.deepcopy(module.state_dict()), torch.zeros(1, 9, 32)
    cached, frequencies = module.max_seq_len_cached, module.inv_freq.clone()
    with rotaries.running(spans):
        found = module(hidden, torch.cat(pieces, -1))
    for place, (span, positions) in enumerate(zip(spans, pieces, strict=True)):
        whole = copy.deepcopy(alone)(hidden, torch.arange(span.length)[None])
        for ours, its in zip(found, whole, strict=True):
            begin = sum(one.num_new for one in spans[:place])
            assert torch.equal(ours[:, begin : begin + span.num_new], its[:, positions[0]])
    assert module.max_seq_len_cached == cached
    assert torch.equal(module.inv_freq, frequencies)
    assert before.keys() == module.state_dict().keys()


def test_a_state_that_generate_of_another_thread_has_half_changed_does_no_harm():
    model = rope_model("dynamic")
    rotaries, module, span = learnt(model), model.model.rotary_emb, [Span(10, 10)]
    positions = torch.arange(10)[None]
    wanted = copy.deepcopy(module)(torch.zeros(1, 10, 32), positions)
    module(torch.zeros(1, 1, 32), torch.tensor([[60]]))
    module.max_seq_len_cached = ORIGINAL  # while the frequencies are those of 61 positions
    with rotaries.running(span):
        found = module(torch.zeros(1, 10, 32), positions)
    assert all(torch.equal(ours, its) for ours, its in zip(found, wanted, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_rotary_embeddings_of_its_own(duplicate):
    model = rope_model("dynamic")
    learnt(model)
    other = duplicate(model)
    assert learnt(other).scaling_of(60) == learnt(model).scaling_of(60)
    other(torch.zeros(1, 60, dtype=torch.long))
    assert other.model.rotary_emb.max_seq_len_cached == 60
    assert model.model.rotary_emb.max_seq_len_cached == ORIGINAL


def test_dynamic_scaling_makes_a_context_of_its_factor():
    assert context_positions(rope_model("dynamic")) == 4 * ORIGINAL
    assert context_positions(rope_model("by type of layer")) == 4 * ORIGINAL
    assert context_positions(rope_model("linear")) == 4 * ORIGINAL, "as its config says"


def test_a_model_that_cannot_say_whether_its_cache_stays_is_refused():
    model = rope_model("longrope")

    class Other(type(model)):
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
            return {"input_ids": input_ids[:, past_key_values.seen_tokens :]}

    model.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="seen_tokens"):
        Engine(model)
