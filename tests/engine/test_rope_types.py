"""The tokens of generate() where rotary embeddings or attention scale by the length, on both sides of the boundary."""

import copy

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from helpers.engine_requests import GREEDY, answers, assert_empty, generated, tokens
from helpers.rope_models import ORIGINAL, PROMPTS, ROPES, rope_model, truth, wrong_answers
from moeflow.engine.engine import Engine

DEPENDENT = ("dynamic", "longrope", "longrope, cache dropped", "by type of layer")
ALL = [prompt for prompts in PROMPTS.values() for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_answers_as_generate_alone_and_together(rope):
    found = wrong_answers(rope_model(rope), max_step_tokens=32)
    assert {kind: row[:2] for kind, row in found.items()} == {kind: [0, 0] for kind in PROMPTS}


@pytest.mark.slow
@pytest.mark.parametrize("rope", DEPENDENT)
@pytest.mark.parametrize(("batch", "budget", "share"), [(2, 3, False), (4, 7, True), (10, 512, True)])
def test_a_prompt_in_pieces_is_scaled_as_a_whole_one(rope, batch, budget, share):
    model = rope_model(rope)
    wanted = [truth(model, prompt) for prompt in ALL]
    with Engine(model, max_batch_size=batch, max_step_tokens=budget, share_prefixes=share) as engine:
        assert answers(engine, ALL) == wanted
        assert (engine.stats()["shared_tokens"] > 0) == share
        assert_empty(engine)


@pytest.mark.parametrize("rope", ["dynamic", "longrope, cache dropped"])
def test_an_engine_and_generate_leave_each_other_no_scaling(rope):
    model = rope_model(rope)
    fresh, long, medium = copy.deepcopy(model), PROMPTS["long"][3], PROMPTS["long"][0]
    with Engine(model) as engine:
        assert answers(engine, [long]) == [truth(fresh, long)]
        assert generated(model, medium) == truth(fresh, medium)
        assert generated(model, long) == truth(fresh, long)
        assert answers(engine, [medium]) == [truth(fresh, medium)]
    with Engine(model) as other, Engine(model) as third:
        assert (
            answers(other, [long, medium])
            == answers(third, [long, medium])
            == [truth(fresh, long), truth(fresh, medium)]
        )
    assert generated(copy.deepcopy(model), PROMPTS["short"][0]) == truth(fresh, PROMPTS["short"][0])


def test_only_keys_of_one_scaling_are_shared():
    model = rope_model("longrope")
    short, long = PROMPTS["crossing"][0], PROMPTS["long"][1]
    with Engine(model) as engine:
        engine.generate([short, long], GREEDY)
        assert engine.stats()["shared_tokens"] == 0
        assert engine.generate([long], GREEDY)[0].cached_tokens == len(long) - 1


def test_keys_are_computed_anew_where_generate_drops_its_cache():
    prompt = PROMPTS["crossing"][0]
    for rope, num_computed in (("longrope", len(prompt)), ("longrope, cache dropped", len(prompt) + ORIGINAL + 1)):
        with Engine(rope_model(rope), max_step_tokens=32) as engine:
            engine.generate([prompt], GREEDY)
            assert engine.stats()["prompt_tokens"] == num_computed


def test_a_model_that_asks_for_the_length_of_its_cache_runs_each_sequence_apart():
    config = Llama4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4,
        attention_chunk_size=16, floor_scale=4, attn_scale=0.5, attn_temperature_tuning=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    for tensor in model.parameters():
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=0.2)
    prompts = [tokens(count, count) for count in (3, 20, 45)]
    with Engine(model, max_step_tokens=32) as engine:
        assert answers(engine, prompts) == [generated(model, prompt) for prompt in prompts]
        assert engine.stats()["retries"] == 0
