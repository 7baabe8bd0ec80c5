"""What a forward pass is, told from the arguments that a model's hook sees."""

import pytest
import torch
from transformers import DynamicCache

from helpers.engine_requests import NEW, PROMPTS, answers, generated
from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import letter_tokenizer
from moeflow.chat.answer import stream_answer
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.hf.passes.forward import describe_pass

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {"input_ids": IDS}), ((IDS,), {}), ((IDS,), {"input_ids": None}), ((IDS,), {"cache": None})],
)
def test_tokens_are_found_whatever_way_they_are_given(args, kwargs):
    begun = describe_pass(args, kwargs)
    assert begun[:3] == (2, 3, False)
    assert begun.token_ids is IDS
    assert begun.cache is None


def test_embeddings_are_a_pass_whose_tokens_are_not_known():
    begun = describe_pass((), {"inputs_embeds": torch.zeros(2, 3, 8), "attention_mask": torch.ones(2, 3)})
    assert begun[:4] == (2, 3, False, None)
    assert begun.attention_mask.shape == (2, 3)


def test_a_call_without_tokens_is_no_pass():
    assert describe_pass((), {"attention_mask": torch.ones(2, 3)}) is None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_filled_cache_continues_and_an_empty_one_does_not(name):
    cache = DynamicCache()
    assert not describe_pass((IDS,), {name: cache}).continues
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    begun = describe_pass((IDS,), {name: cache})
    assert begun.continues
    assert begun.cache is cache


def test_a_cache_without_a_length_continues_with_one_position_at_a_time():
    assert not describe_pass((IDS,), {"past_key_values": object()}).continues
    assert describe_pass((IDS[:, :1],), {"past_key_values": object()}).continues


def test_a_cache_of_many_sequences_describes_its_pass_itself():
    class Packed:
        def describe_pass(self, input_ids):
            return input_ids.shape[1], 1, True, input_ids.reshape(-1, 1)

        def get_seq_length(self):
            raise AssertionError("only models ask")

    begun = describe_pass((), {"input_ids": IDS[:1], "past_key_values": Packed()})
    assert begun[:3] == (3, 1, True)
    assert begun.token_ids.tolist() == [[1], [2], [3]]


def test_of_a_prompt_only_the_last_position_gets_logits_whatever_runs_it():
    model, rows = tiny_mixtral(), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(inputs[0].numel() // 64))
    for prompt in PROMPTS:
        generated(model, prompt)
    assert rows == [1] * NEW * len(PROMPTS)
    rows.clear()
    "".join(stream_answer(model, letter_tokenizer(), torch.tensor([PROMPTS[1]]), SamplingParams(max_new_tokens=NEW)))
    assert set(rows) == {1}
    rows.clear()
    with Engine(model, max_batch_size=4, max_step_tokens=7) as engine:  # prompts in pieces
        answers(engine)
    assert max(rows) <= 4  # sequences, of up to 7 tokens in a pass
