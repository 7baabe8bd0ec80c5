"""Shared fixtures: small real checkpoints on disk, and where test data made by others lies."""

import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent

# A shell's background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of shared test data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no test data here: set MOEFLOW_TEST_DATA")
    return folder


def tiny_mixtral(**overrides):
    """Build a random Mixtral of 3 layers x 8 experts, of which a token takes 2."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    return MixtralForCausalLM(MixtralConfig(**{**values, **overrides})).eval()


@pytest.fixture(scope="session")
def mixtral():
    """The model whose checkpoint `mixtral_folder` is."""
    return tiny_mixtral()


@pytest.fixture(scope="session")
def mixtral_folder(mixtral, tmp_path_factory) -> Path:
    """A sharded checkpoint, experts of one layer spread over shards. Tests must not change it."""
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    mixtral.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="session")
def speaking_folder(mixtral_folder, tmp_path_factory) -> Path:
    """The same checkpoint with a tokenizer that has a chat template, as commands need it. Tests must not change it."""
    from small_tokenizers import letter_tokenizer

    folder = shutil.copytree(mixtral_folder, tmp_path_factory.mktemp("speaking") / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}a:"
    letter_tokenizer(chat_template=template).save_pretrained(folder)
    return folder
