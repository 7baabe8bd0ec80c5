"""What a model reads of a conversation, what is forgotten when it grows too long, and the file it is saved in."""

from types import SimpleNamespace

import pytest
from transformers import MixtralConfig

from helpers.small_tokenizers import byte_tokenizer
from moeflow.chat.conversation import Conversation
from moeflow.errors import MoeflowError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer(eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def conversation_of(*texts, system=None):
    conversation = Conversation(system)
    conversation.turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return conversation


def test_template_sees_system_prompt_and_turns(tokenizer):
    ids = conversation_of("a", "b", "c", system="S").encode(tokenizer)
    assert tokenizer.decode(ids[0]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_without_a_system_role_gets_it_in_the_first_message(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    ids = conversation_of("a", "b", "c", system="S").encode(tokenizer)
    assert tokenizer.decode(ids[0]).startswith("<|im_start|>user\nS\n\na<|im_end|>\n<|im_start|>assistant\nb")


def test_template_that_refuses_is_an_error_with_its_words(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(MoeflowError, match="never"):
        conversation_of("a", system="S").encode(tokenizer)


def test_tokenizer_without_template_continues_the_text(tokenizer):
    tokenizer.chat_template = None
    ids = conversation_of("The sky", " is blue.", "The sea", system="Facts").encode(tokenizer)
    assert tokenizer.decode(ids[0]) == "Facts\nThe sky is blue.\nThe sea"


def context_of(max_position_embeddings):
    """All that `fit` asks of a model: the length of its context."""
    config = MixtralConfig(max_position_embeddings=max_position_embeddings)
    return SimpleNamespace(config=config)


def test_oldest_exchanges_are_forgotten_until_the_answer_fits(tokenizer):
    length = conversation_of("user 1", "said 1", "user 2", system="S").encode(tokenizer).shape[1]
    conversation = conversation_of("user 0", "said 0", "user 1", "said 1", "user 2", system="S")
    ids, room, num_forgotten = conversation.fit(context_of(length + 50), tokenizer, 50)
    assert (ids.shape[1], room, num_forgotten) == (length, 50, 1)
    assert [turn["content"] for turn in conversation.messages] == ["S", "user 1", "said 1", "user 2"]
    assert conversation.fit(context_of(length + 49), tokenizer, 50)[2] == 1
    assert [turn["content"] for turn in conversation.messages] == ["S", "user 2"]


def test_conversation_that_fits_loses_nothing(tokenizer):
    conversation = conversation_of("a", "b", "c")
    length = conversation.encode(tokenizer).shape[1]
    assert conversation.fit(context_of(length + 50), tokenizer, 50)[1:] == (50, 0)


def test_answer_gets_less_room_where_the_message_leaves_less(tokenizer):
    conversation = conversation_of("x" * 100)
    length = conversation.encode(tokenizer).shape[1]
    assert conversation.fit(context_of(length + 7), tokenizer, 50)[1:] == (7, 0)


def test_message_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(MoeflowError, match=r"context is 64: shorten it"):
        conversation_of("x" * 100).fit(context_of(64), tokenizer, 50)


def test_long_conversation_never_fails(tokenizer, tmp_path):
    saved = tmp_path / "long.json"
    conversation_of(*["word " * 4, "reply"] * 20).save(saved)
    conversation = Conversation.load(saved)
    conversation.turns.append({"role": "user", "content": "and now"})
    ids, room, num_forgotten = conversation.fit(context_of(128), tokenizer, 40)
    assert ids.shape[1] + room <= 128
    assert num_forgotten > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\xff\xfe", "not a conversation|not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "found dict"),
        ('[{"role": "user"}]', "message 1 is something else"),
        ('[{"role": "user", "content": ["a"]}]', "message 1 is something else"),
        ('["a"]', "message 1 is something else"),
        ('[{"role": "user", "content": "\\ud800"}]', "message 1 of .*which is no text"),
        ('[{"role": "user", "content": "a"}]', "take turns"),
        ('[{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]', "take turns"),
        ('[{"role": "system", "content": "a"}, {"role": "system", "content": "a"}]', "take turns"),
    ],
)
def test_corrupt_conversation_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MoeflowError, match=message) as caught:
        Conversation.load(path)
    assert "broken.json" in str(caught.value)


def test_file_of_other_encoding_is_refused(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(MoeflowError, match=r"latin\.json is not JSON"):
        Conversation.load(tmp_path / "latin.json")


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(MoeflowError, match="cannot be written"):
        conversation_of("a", "b").save(target)
    assert list(tmp_path.iterdir()) == [target]


def test_save_replaces_a_file_whole(tmp_path):
    path = tmp_path / "c.json"
    conversation_of("long " * 1000, "b").save(path)
    conversation_of("é", "b", system="S").save(path)
    assert Conversation.load(path).messages == conversation_of("é", "b", system="S").messages
