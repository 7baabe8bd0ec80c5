"""Tools of a request are checked by name, and bind the answer where one must be called."""

import pytest

from moeflow.errors import ConfigError
from moeflow.server.reading.conversation import read_conversation
from moeflow.server.reading.hermes import with_tools_as_text
from moeflow.server.reading.tools import read_tools

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}


def tool(name: str, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", **more}}


def test_tools_are_read_with_all_that_a_template_looks_at():
    (read,) = read_tools({"tools": [{"function": {"name": "weather", "parameters": PLACE}}]}).tools
    assert read == {"type": "function", "function": {"name": "weather", "description": "", "parameters": PLACE}}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"tools": {}}, None),
        ({"tools": "weather"}, "a list of at most"),
        ({"tools": [tool("a")] * 129}, "a list of at most 128"),
        ({"tools": [tool("a"), tool("b"), tool("a")]}, "'a' twice"),
        ({"tools": [{"type": "retrieval"}]}, "only functions"),
        ({"tools": [{"type": "function"}]}, "must be an object"),
        ({"tools": [tool("a b")]}, "'a b' as the name of tool 1"),
        ({"tools": [tool("a", parameters=[])]}, "a JSON schema"),
        ({"tools": [tool("a", parameters="x")]}, "a JSON schema"),
        ({"tools": [tool("a", description=7)]}, "must be a text"),
        ({"tools": [tool("a", code="x")]}, "has 'code'"),
        ({"tools": [tool("a")], "tool_choice": "b"}, "tool_choice is 'b'"),
        ({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tools has a"),
        ({"tool_choice": "required"}, "no tools to call"),
        ({"tools": [tool("a")], "parallel_tool_calls": 1}, "true or false"),
    ],
)
def test_what_is_wrong_with_tools_is_named(body, told):
    if told is None:
        read_tools(body)
        return
    with pytest.raises(ConfigError, match=told):
        read_tools(body)


def test_an_answer_that_must_call_is_bound_to_calls_of_what_is_offered():
    tools = [tool("a", parameters=PLACE), tool("b")]
    assert read_tools({"tools": tools}).schema is None
    assert read_tools({"tools": tools, "tool_choice": "none"}).offered == []
    required = read_tools({"tools": tools, "tool_choice": "required"})
    assert [item["properties"]["name"]["const"] for item in required.schema["items"]["anyOf"]] == ["a", "b"]
    assert "maxItems" not in required.schema
    named = read_tools({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "a"}}})
    assert [one["function"]["name"] for one in named.offered] == ["a"]
    assert named.schema["maxItems"] == 1
    assert named.schema["items"]["anyOf"][0]["properties"]["arguments"] == PLACE


CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "X"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
]


def test_calls_and_results_are_read_as_templates_take_them():
    _, call, result = read_conversation(CALLED)
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"place": "X"}}
    assert result == {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Rain."}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (CALLED[:1] + CALLED[2:], "no message before it has called"),
        ([CALLED[0], {**CALLED[1], "tool_calls": "x"}], "must be a list"),
        ([CALLED[0], {**CALLED[1], "tool_calls": [{"id": "c1"}]}], "it must be"),
        (
            [CALLED[0], {**CALLED[1], "tool_calls": [{"id": "c", "function": {"name": "a", "arguments": "{"}}]}],
            "a JSON object",
        ),
        ([{"role": "user", "content": "x", "tool_call_id": "c1"}], "tool_call_id"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(messages, told):
    with pytest.raises(ConfigError, match=told):
        read_conversation(messages)


def test_a_developer_is_the_system_and_earlier_reasoning_is_left_out():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
        {"role": "user", "content": "Bye"},
    ]
    assert read_conversation(messages)[0] == {"role": "system", "content": "Be brief."}
    assert "reasoning_content" not in read_conversation(messages)[2]


def test_tools_are_text_for_templates_without():
    system, user, call, result = with_tools_as_text(
        read_conversation(CALLED), read_tools({"tools": [tool("weather")]}).tools
    )
    assert system["role"] == "system"
    assert '"name": "weather"' in system["content"]
    assert user["content"] == "Weather?"
    assert call == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "weather", "arguments": {"place": "X"}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\nRain.\n</tool_response>"}
