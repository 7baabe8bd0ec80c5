"""Shared fixtures: small real checkpoints on disk, and the folder of test data; the lanes that tests run in."""

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from helpers.lanes import needs_torch, selects
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("repeatable", derandomize=True)  # a suite that is green stays green
settings.load_profile("repeatable")

_MODEL_FIXTURES = {"gguf_file", "mixtral", "mixtral_folder", "speaking_folder"}
_HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "transformers")))

# A shell's background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, from commands that tests start too, unless the run asks for the tests that need one."""
    if not selects("gpu", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files, and folders whose conftest.py, cannot be imported where torch is not installed."""
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if not _HAS_TORCH and file.suffix == ".py" and file.is_file() and needs_torch(file):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need: `torch` by their file's imports or a model's fixture, `data` by its fixture."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        beside = item.path.with_name("conftest.py")
        if needs_torch(item.path) or (beside.is_file() and needs_torch(beside)) or fixtures & _MODEL_FIXTURES:
            item.add_marker("torch")
        if "data_folder" in fixtures:
            item.add_marker("data")
        if not _HAS_TORCH and item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="needs torch and transformers"))


@pytest.fixture(autouse=True)
def _no_progress_bars(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("torch"):
        from tqdm import tqdm
        from transformers.utils import logging

        tqdm.monitor_interval = 0  # no thread of its own, whose beginning is a matter of time
        logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory) -> Iterator[None]:
    """The run has a cache folder of its own, commands that tests start too: one capture of a step serves all tests."""
    before = os.environ.get("MOEFLOW_CACHE")
    os.environ["MOEFLOW_CACHE"] = str(tmp_path_factory.mktemp("moeflow-cache"))
    yield
    if before is None:
        del os.environ["MOEFLOW_CACHE"]
    else:
        os.environ["MOEFLOW_CACHE"] = before


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A small model in a GGUF file, in a folder of its own with a chat template."""
    from helpers.small_gguf import write_small

    return write_small(tmp_path_factory.mktemp("gguf"))[0]


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
