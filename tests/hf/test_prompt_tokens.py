"""The words of every message reach the prompt, whatever way a chat template takes; how templates may fail."""

import pytest

from helpers.small_tokenizers import byte_tokenizer
from moeflow.errors import ConfigError, MoeflowError
from moeflow.hf.prompt_tokens import check_text, encode_messages, encode_text

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
    with pytest.raises(MoeflowError, match=f"leaves out message {number}, of the"):
        written(template, messages)


def test_a_message_without_words_need_not_be_in_the_prompt():
    assert written(NO_SYSTEM, [{"role": "system", "content": " \n"}, {"role": "user", "content": "a"}]) == "<user>a"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no\nmore') }}", "refuses this conversation: no more"),
        ("{% if %}", "refuses this conversation: "),
        ("{{ 1 + 'a' }}", "fails on this conversation: TypeError: "),
        ("{{ 1 // 0 }}", "fails on this conversation: ZeroDivisionError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this conversation: RecursionError: "),
        ("{{ range(10**9) }}", "fails on this conversation: OverflowError: "),
        ("{{ messages['x'].y.z }}", "refuses this conversation: "),
        ({"tool_use": "x"}, "fails on this conversation: ValueError: "),
    ],
)
def test_a_template_may_fail_in_any_way_and_the_error_is_one_line(template, told):
    with pytest.raises(MoeflowError, match=told) as caught:
        written(template)
    assert "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_no_text():
    tokenizer = byte_tokenizer(chat_template=AS_TEXT)
    with pytest.raises(ConfigError, match="the prompt has half of a surrogate pair at character 2"):
        encode_text(tokenizer, "a\udcff")
    with pytest.raises(ConfigError, match="message 2 has half"):
        encode_messages(tokenizer, [*CONVERSATION[:1], {"role": "user", "content": "\ud800"}])
    assert check_text("\U0001f600", "it") == "\U0001f600"


def test_a_tokenizer_that_fails_on_a_text_is_an_error_of_that_text():
    class Picky:
        def __call__(self, text):
            raise KeyError(text)

    with pytest.raises(ConfigError, match="tokenizer fails on this text: KeyError: 'hi'"):
        encode_text(Picky(), "hi")


def test_of_a_text_far_longer_than_the_context_the_beginning_is_enough():
    tokenizer, long = byte_tokenizer(chat_template=AS_TEXT), "x" * 300_000
    messages = [{"role": "user", "content": long}]
    assert len(encode_text(tokenizer, long, 256)) == len(encode_messages(tokenizer, messages, 256)) == 200_000
    assert len(encode_text(tokenizer, long, 150_000)) == len(encode_text(tokenizer, long)) == 300_000
    assert len(encode_messages(tokenizer, messages, 150_000)) == len("<user>") + 300_000
