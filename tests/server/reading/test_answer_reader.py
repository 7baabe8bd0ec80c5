"""Answers of many families are read, however they are cut: text, reasoning and tool calls apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeflow.server.reading.answer_reader import AnswerReader, Part, Reasoning, Text, ToolCall
from moeflow.server.reading.forced_calls import ForcedCallsReader
from moeflow.server.reading.marks import marks_of

HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


class Tokenizer:
    """What `marks_of` looks at."""

    def __init__(self, chat_template: str, special: tuple[str, ...] = ("<|im_end|>",), response_template=None) -> None:
        self.chat_template = chat_template
        self.all_special_tokens = list(special)
        self.response_template = response_template


def tool(name: str, **properties: str) -> dict:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def read(template: str, text: str, *, step: int = 1, calls: bool = True, prompt: str = "", tools=None) -> list[Part]:
    """Read a text that comes in pieces of `step` characters, and join neighbours of a kind."""
    reader = AnswerReader(marks_of(Tokenizer(template), calls=calls), prompt, tools)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    joined: list[Part] = []
    for part in parts:
        if joined and type(joined[-1]) is type(part) and not isinstance(part, ToolCall):
            joined[-1] = type(part)(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


ANSWERS = {
    "text": ("", "Hello <there>", [Text("Hello <there>")]),
    "think": ("<think>", "<think>\nhm</think>\n\nHello", [Reasoning("hm"), Text("Hello")]),
    "hermes": (
        "<tool_call>",
        'Look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "g", '
        '"arguments": {}}\n</tool_call>',
        [Text("Look."), ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")],
    ),
    "think and call": (
        "<think> <tool_call>",
        '<think>hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>',
        [Reasoning("hm"), ToolCall("f", "{}")],
    ),
    "coder": (
        "<tool_call> <function=",
        "<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n</function>\n</tool_call>",
        [ToolCall("f", '{"a": "x y"}')],
    ),
    "glm": (
        "<tool_call> <arg_key>",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        [ToolCall("f", '{"a": "x"}')],
    ),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [ToolCall("f", '{"a": 1}')]),
    "mistral since 2025": (
        "[TOOL_CALLS] [ARGS]",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")],
    ),
    "harmony": ("<|channel|>", f"{HARMONY}<|channel|>final<|message|>Hello", [Reasoning("hm"), Text("Hello")]),
    "harmony with a call": (
        "<|channel|>",
        f'{HARMONY}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"a": 1}}<|call|>',
        [Reasoning("hm"), ToolCall("f", '{"a": 1}')],
    ),
}


@pytest.mark.parametrize(("template", "text", "parts"), ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_family_is_read(template, text, parts, step):
    assert read(template, text, step=step) == parts


def test_an_answer_that_the_prompt_has_begun_is_read():
    assert read("<think>", "hm</think>Hello", prompt="...<think>\n") == [Reasoning("hm"), Text("Hello")]


@pytest.mark.parametrize(
    "call",
    [
        '<tool_call>{"name": "f", "argu</tool_call> x',
        '<tool_call>{"name": "f"',
        "<tool_call>[1]</tool_call>",
        "<tool_call>",
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_a_call_that_is_none_stays_text_to_the_letter(call, step):
    (part,) = read("<tool_call>", f"Look: {call}", step=step)
    assert part == Text(f"Look: {call}")


def test_a_call_of_a_tool_that_is_not_there_is_text():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read("<tool_call>", text, tools=[tool("f")]) == [ToolCall("f", "{}")]
    assert read("<tool_call>", text, tools=[tool("g")]) == [Text(text)]


def test_calls_are_text_where_none_are_asked_for():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read("<tool_call> <think>", text, calls=False) == [Text(text)]


def test_arguments_have_the_types_of_the_tool():
    text = "<tool_call><function=f><parameter=a>1</parameter><parameter=b>1</parameter></function></tool_call>"
    (call,) = read("<tool_call> <function=", text, tools=[tool("f", a="integer", b="string")])
    assert call == ToolCall("f", '{"a": 1, "b": "1"}')


def test_marks_that_are_special_tokens_are_told():
    assert marks_of(Tokenizer("<|channel|>", ("<|channel|>",)), calls=False).are_special
    assert not marks_of(Tokenizer("<think>", ("<|im_end|>",)), calls=False).are_special


def test_a_tokenizer_says_how_its_answers_are_read():
    template = {
        "start_anchor_pattern": r"\A",
        "fields": {"thinking": {"open": "<a>", "close": "</a>", "content": "text"}, "content": {"content": "text"}},
    }
    reader = AnswerReader(marks_of(Tokenizer("<think>", response_template=template), calls=True))
    assert [*reader.push("<a>hm</a>Hello"), *reader.finish()] == [Reasoning("hm"), Text("Hello")]


@given(st.lists(st.sampled_from([*"<>/{}[] \n", "think", "tool_call", "hm", '"name"']), max_size=30), st.integers(1, 5))
def test_nothing_breaks_a_reader_and_text_without_marks_stays(words, step):
    text = "".join(words)
    parts = read("<think> <tool_call>", text, step=step)
    if "<think>" not in text and "<tool_call>" not in text:
        assert parts == ([Text(text.lstrip())] if text.strip() else [])


def test_calls_that_a_grammar_has_forced_are_read_at_the_end():
    whole, cut = ForcedCallsReader(), ForcedCallsReader()
    assert whole.push('[{"name": "f", "argu') == whole.push('ments": {"a": 1}}]') == []
    assert whole.finish() == [ToolCall("f", '{"a": 1}')]
    assert cut.push('[{"name": "f"') == []
    assert cut.finish() == [Text('[{"name": "f"')]


@pytest.mark.parametrize("step", [1, 1000])
def test_calls_beyond_the_most_are_left_out(step):
    text = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "fgh")
    reader = AnswerReader(marks_of(Tokenizer("<tool_call>"), calls=True), most_calls=1)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    assert [part for piece in pieces for part in reader.push(piece)] + reader.finish() == [ToolCall("f", "{}")]
