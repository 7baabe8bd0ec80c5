"""Encoding: text that is none, a template that fails and a damaged tokenizer are told, never raised from elsewhere."""

import json

import pytest
from transformers import AutoTokenizer

from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer
from moeflow.chat.conversation import Conversation
from moeflow.errors import CheckpointError, ConfigError, MoeflowError
from moeflow.hf.encoding import check_text, encode_messages, encode_text
from moeflow.hf.pretrained import load_tokenizer

AS_TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
AS_PARTS = "{% for m in messages %}<{{ m.role }}>" + PARTS + "{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + PARTS
    + "{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM_PARTS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>" + PARTS + "{% endfor %}"
SHORT_REASONING = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "hm</think>yes"},
    {"role": "user", "content": "a"},
]
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


def written(template, messages=CONVERSATION):
    tokenizer = byte_tokenizer(chat_template=template)
    return tokenizer.decode(encode_messages(tokenizer, messages))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (AS_TEXT, "<system>be brief<user>hi<assistant>hm</think>yes<user>a"),
        (AS_PARTS, "<system>be brief<user> hi <assistant>hm</think>yes<user>a"),
        (EITHER, "<system>be brief<user> hi <assistant>hm</think>yes<user>a"),
        (NO_SYSTEM, "<user>be brief\n\n hi <assistant>hm</think>yes<user>a"),
        (NO_SYSTEM_PARTS, "<user>be brief\n\n hi <assistant>hm</think>yes<user>a"),
        (SHORT_REASONING, "<system>be brief<user> hi <assistant>yes<user>a"),
        (None, "be brief\n hi hm</think>yes\na"),
    ],
    ids=["text", "parts", "either", "no system", "no system, parts", "reasoning left out", "no template"],
)
def test_every_message_is_in_the_prompt(template, expected):
    assert written(template) == expected


def test_two_questions_are_two_prompts_where_the_template_walks_over_parts():
    asked = [written(AS_PARTS, [{"role": "user", "content": question}]) for question in ("one?", "two?")]
    assert asked == ["<user>one?", "<user>two?"]


@pytest.mark.parametrize(
    ("template", "number"),
    [
        ("{{ messages[-1].content }}", 1),
        ("the same for all", 1),
        ("{{ messages[0].content }} {{ messages[1].content }} {{ messages[-1].content }}", 3),
        ("{% for m in messages %}{{ m.content[0].words }}{% endfor %}", 1),
        ("{% for m in messages if m.content is not string %}{{ m.content }}{% endfor %}", 1),
        ("{% for m in messages if m.content is not string %}{{ m.content | tojson }}{% endfor %}", 1),
    ],
)
def test_a_message_that_the_template_leaves_out_is_named(template, number):
    messages = [*CONVERSATION[1:3], *CONVERSATION[1:]]
    with pytest.raises(ConfigError, match=f"leaves out message {number}, of the"):
        written(template, messages)


def test_a_message_without_words_need_not_be_in_the_prompt():
    assert written(NO_SYSTEM, [{"role": "system", "content": " \n"}, {"role": "user", "content": "a"}]) == "<user>a"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no\nmore') }}", "refuses this conversation: no more"),
        ("{% if %}", "refuses this conversation: "),
        ("{{ 1 + 'a' }}", "refuses this conversation: TypeError: "),
        ("{{ 1 // 0 }}", "refuses this conversation: ZeroDivisionError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses this conversation: RecursionError: "),
        ("{{ range(10**9) }}", "refuses this conversation: OverflowError: "),
        ("{{ messages['x'].y.z }}", "refuses this conversation: "),
        ({"tool_use": "x"}, "refuses this conversation: ValueError: "),
    ],
)
def test_a_template_may_fail_in_any_way_and_the_error_is_one_line(template, told):
    with pytest.raises(ConfigError, match=told) as caught:
        written(template)
    assert "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_no_text():
    tokenizer = byte_tokenizer(chat_template=AS_TEXT)
    with pytest.raises(ConfigError, match=r"the prompt has '.udcff' at character 2, which is no text"):
        encode_text(tokenizer, "a\udcff")
    with pytest.raises(ConfigError, match=r"message 2 has .*half of a surrogate pair"):
        encode_messages(tokenizer, [*CONVERSATION[:1], {"role": "user", "content": "\ud800"}])
    assert check_text("\U0001f600", "it") == "\U0001f600"


def test_a_tokenizer_that_fails_on_a_text_is_an_error_of_that_text():
    class Picky:
        def __call__(self, text, **options):
            raise KeyError(text)

    with pytest.raises(ConfigError, match="tokenizer cannot read this text: KeyError: 'hi'"):
        encode_text(Picky(), "hi")


def test_of_a_text_far_longer_than_the_context_the_beginning_is_enough():
    tokenizer, long = byte_tokenizer(chat_template=AS_TEXT), "x" * 300_000
    messages = [{"role": "user", "content": long}]
    assert len(encode_text(tokenizer, long, 256)) == len(encode_messages(tokenizer, messages, 256)) == 200_000
    assert len(encode_text(tokenizer, long, 150_000)) == len(encode_text(tokenizer, long)) == 300_000
    assert len(encode_messages(tokenizer, messages, 150_000)) == len("<user>") + 300_000
