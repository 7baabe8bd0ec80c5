"""Shared fixtures: small real checkpoints on disk, and where test data made by others lies."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
    from helpers.small_tokenizers import letter_tokenizer

    folder = shutil.copytree(mixtral_folder, tmp_path_factory.mktemp("speaking") / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}a:"
    letter_tokenizer(chat_template=template).save_pretrained(folder)
    return folder
