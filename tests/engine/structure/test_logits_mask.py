"""`generate` under a grammar gives the tokens of an engine that is bound by it."""

import math

import pytest
import torch
from transformers import LogitsProcessorList

from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.structure.logits_mask import GrammarProcessor, masked
from moeflow.errors import MoeflowError

PROMPT = [5, 6, 7]


def test_logits_beyond_the_tokenizer_and_tokens_beyond_the_logits_are_masked_off():
    logits = torch.arange(6.0)
    allowed = torch.tensor([True, False, True, False])
    expected = torch.tensor([0.0, -math.inf, 2.0, -math.inf, -math.inf, -math.inf])
    assert torch.equal(masked(logits, allowed), expected)
    assert torch.equal(masked(logits[None, :3], allowed)[0], expected[:3])
    assert torch.equal(logits, torch.arange(6.0))


@pytest.mark.parametrize("regex", ['\\{"name": "[a-z]{3}", "n": [0-9]{2}\\}', "[ab]+"])
def test_generate_gives_the_engine_s_tokens(model, either, regex):
    params = SamplingParams(regex=regex, max_new_tokens=50)
    with Engine(model, either) as engine:
        (completion,) = engine.generate([PROMPT], params)
    end = either.eos_token_id
    processor = GrammarProcessor.start(either, (end,), params.structure, len(PROMPT))
    generated = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=[lambda ids, scores, **kwargs: torch.tensor([processor.follow(ids)])],
    )
    assert generated[0, len(PROMPT) :].tolist() == completion.token_ids


def test_tokens_that_the_model_does_not_say_end_the_answer_with_the_reason(bytewise):
    processor = GrammarProcessor.start(bytewise, (256,), ("regex", "[ab]c"), 1)
    with pytest.raises(MoeflowError, match="only tokens that the model does not say"):
        processor(torch.tensor([[5]]), torch.full((1, 300), -math.inf))
    with pytest.raises(MoeflowError, match="the answer cannot go on"):
        processor.follow(torch.tensor([[5, 9]]))
