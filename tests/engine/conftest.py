"""A model whose tokens have text, and what generate() answers to the prompts of helpers.engine_requests."""

import pytest

from helpers.small_models import tiny_mixtral


@pytest.fixture(scope="module")
def expected(mixtral):
    from helpers.engine_requests import PROMPTS, generated

    return [generated(mixtral, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer():
    from helpers.small_tokenizers import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="module")
def speaking(tokenizer):
    """A model whose tokens have text."""
    return tiny_mixtral(vocab_size=len(tokenizer))
