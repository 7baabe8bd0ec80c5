"""generation_config.json: what transformers refuses is refused before weights are read, and names the file."""

import json
import shutil

import pytest
import torch

from helpers.small_tokenizers import letter_tokenizer
from moeflow import load_moe
from moeflow.chat.answer import checkpoint_params, stream_answer
from moeflow.errors import ConfigError
from moeflow.hf.files.generation import check_generation_file


@pytest.fixture
def file(mixtral_folder, tmp_path):
    """The generation_config.json of a copy of the checkpoint."""
    return shutil.copytree(mixtral_folder, tmp_path / "model") / "generation_config.json"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"max_new_tokens": "many"}', "TypeError"),
        (b'{"cache_implementation": "hot"}', "Invalid `cache_implementation`"),
        (b'{"suppress_tokens": 5}', "TypeError"),
    ],
)
def test_what_transformers_refuses_is_refused_by_name(file, content, said):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_moe(file.parent)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xe9", b"\xef\xbb\xbf{}", b'{"own_field": 5}'])
def test_what_transformers_leaves_aside_is_left_aside(file, content):
    file.write_bytes(content)
    load_moe(file.parent, expert_memory="50%").moeflow.close()


def test_a_folder_may_lack_the_file(tmp_path):
    check_generation_file(tmp_path)


def test_sampling_of_the_checkpoint_that_cannot_be_names_the_file(file):
    fields = {"temperature": "hot", "do_sample": True}
    file.write_text(json.dumps(fields))
    model = load_moe(file.parent, expert_memory="50%")
    with model.moeflow, pytest.raises(ConfigError, match=r"generation_config\.json.*temperature is 'hot'"):
        checkpoint_params(model)
    assert checkpoint_params(model, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": "hot"},
        {"eos_token_id": 5.5},
        {"eos_token_id": [2, "x"]},
        {"eos_token_id": 10**30},
        {"bad_words_ids": 5},
        {"suppress_tokens": "hot"},
    ],
)
def test_settings_that_only_generate_refuses_name_the_file_in_an_answer(file, fields):
    file.write_text(json.dumps(fields))
    model = load_moe(file.parent, expert_memory="50%")

    def answer():
        params = checkpoint_params(model, max_new_tokens=2)
        with stream_answer(model, letter_tokenizer(), torch.tensor([[3, 4]]), params) as stream:
            list(stream)

    with model.moeflow, pytest.raises(ConfigError, match=r"generation_config\.json"):
        answer()
