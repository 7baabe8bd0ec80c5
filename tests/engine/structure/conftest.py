"""Tokenizers of both kinds, with special tokens, and a random model with more logits than either has tokens."""

import pytest

from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import byte_tokenizer, sentencepiece_tokenizer

LOGITS = 384


@pytest.fixture(scope="module")
def bytewise():
    return byte_tokenizer(eos_token="<|end|>", additional_special_tokens=["<|tool|>"])


@pytest.fixture(scope="module")
def sentencepiece():
    return sentencepiece_tokenizer(additional_special_tokens=["[TOOL]"])


@pytest.fixture(scope="module", params=["bytewise", "sentencepiece"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model():
    made = tiny_mixtral(vocab_size=LOGITS)
    made.generation_config.eos_token_id = None  # the tokenizer names the end
    return made
