"""Encoding: text that is none, a template that fails and a damaged tokenizer are told, never raised from elsewhere."""

import json

import pytest
from transformers import AutoTokenizer

from helpers.small_tokenizers import letter_tokenizer
from moeflow.chat.conversation import Conversation
from moeflow.errors import CheckpointError, ConfigError, MoeflowError
from moeflow.hf.encoding import encode_messages, encode_text
from moeflow.hf.pretrained import load_tokenizer

ASKED = [{"role": "user", "content": "hi"}]


def test_ids_are_those_of_the_tokenizer():
    tokenizer = letter_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}a:")
    assert encode_text(tokenizer, "abc") == tokenizer("abc")["input_ids"]
    assert encode_messages(tokenizer, ASKED) == tokenizer.apply_chat_template(ASKED, return_dict=True)["input_ids"]
    assert Conversation(None, ASKED).encode(tokenizer).tolist() == [encode_messages(tokenizer, ASKED)]
    assert Conversation(None, ASKED).encode(letter_tokenizer()).tolist() == [tokenizer("hi")["input_ids"]]


def test_half_a_character_is_no_text():
    tokenizer = letter_tokenizer(chat_template="{{ messages[0]['content'] }}")
    for call in (
        lambda: encode_text(tokenizer, "ab\udcff"),
        lambda: encode_messages(tokenizer, [{"role": "user", "content": "ab\udcff"}]),
    ):
        with pytest.raises(ConfigError, match="at character 3, which is no text"):
            call()


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[5].x.y }}",
        "{{ raise_exception('no') }}",
        "{{ x | no_such_filter }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0]['content'] + 5 }}",
        "{{ none() }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_template_that_fails_in_any_way_refuses_the_conversation(template, system):
    with pytest.raises(MoeflowError, match=r"chat template refuses this conversation: .") as caught:
        Conversation(system, ASKED).encode(letter_tokenizer(chat_template=template))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"model": {"type": "Newer"}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Newer"}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"version": "9.0"}),
        ("tokenizer_config.json", {"model_max_length": "hot"}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_files_of_a_tokenizer_that_cannot_be_loaded_name_the_folder(tmp_path, file, change):
    letter_tokenizer().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**fields, **change}))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xe9", b"[" * 100_000, b'{"model": ' * 100_000])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_tokenizer_is_refused_where_transformers_refuses_it(tmp_path, file, content):
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    try:
        expected = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False).get_vocab()
    except Exception:
        with pytest.raises(MoeflowError):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).get_vocab() == expected
