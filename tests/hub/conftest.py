"""A hub of two shards on this machine, and the settings of huggingface_hub that lead to it."""

import random

import pytest

from helpers.hub_server import hub, lead_to

SMALL = {
    "config.json": b'{"model_type": "mixtral"}',
    "tokenizer.json": b"{}",
    "README.md": b"# a model",
    "original/old.safetensors": b"old",
    "consolidated.safetensors": b"another form",
    "pytorch_model.bin": b"a pickle",
    "empty.txt": b"",
}


@pytest.fixture
def files():
    draw = random.Random(0)
    return {
        **SMALL,
        "model-1.safetensors": draw.randbytes(9_000_000),
        "model-2.safetensors": draw.randbytes(3_000_000),
    }


@pytest.fixture
def server(files, monkeypatch, tmp_path):
    """The hub; in this process huggingface_hub and moeflow ask it, with a cache of its own."""
    with hub(files) as served:
        lead_to(served, monkeypatch, tmp_path / "cache")
        yield served
