"""Servers for all clients: one that says what its script says, and one whose answers a schema can bind."""

from typing import Literal

import pytest

from helpers.scripted_models import SCRIPTS, scripted
from helpers.servers import TEMPLATE, serving, small_model
from helpers.small_tokenizers import byte_tokenizer


@pytest.fixture(scope="package")
def speaking():
    with serving(*scripted(SCRIPTS)) as client:
        yield client


@pytest.fixture(scope="package")
def bound():
    tokenizer = byte_tokenizer(eos_token="<|end|>", chat_template=TEMPLATE)
    with serving(small_model(vocab_size=300), tokenizer) as client:
        yield client


@pytest.fixture(scope="session")
def person():
    """A pydantic model whose answers are short, also where a client drops the bounds of texts and numbers."""
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: Literal["Ada", "Bob"]
        age: Literal[36, 45]

    return Person
