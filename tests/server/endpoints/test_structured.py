"""Answers bound by a schema, a regular expression, a grammar, or by a tool that must be called, over HTTP."""

import json
import re

import pytest

from helpers.servers import CHAT, TEXT, refused, serving, small_model, streamed, user
from helpers.small_tokenizers import byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}a:"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {"name": "leave", "parameters": {"type": "object", "additionalProperties": False}},
    },
]
HOT = {"temperature": 1.5, "max_tokens": 200}


@pytest.fixture(scope="module")
def client():
    tokenizer = byte_tokenizer(eos_token="<|end|>", chat_template=TEMPLATE)
    with serving(small_model(vocab_size=300), tokenizer) as client:
        yield client


def answer(client, **body):
    response = client.post(CHAT, json={"messages": user("hello"), **HOT, **body})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def in_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def check(person):
    assert set(person) == {"name", "age"}
    assert person["name"] in ("Ada", "Bob")
    assert person["age"] in range(100)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_is_what_its_schema_allows(client, seed):
    form = in_schema(SCHEMA)
    choice = answer(client, response_format=form, seed=seed)
    assert choice["finish_reason"] == "stop"
    check(json.loads(choice["message"]["content"]))
    chunks = streamed(client, CHAT, {"messages": user("hello"), **HOT, "response_format": form, "seed": seed})[:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == choice["message"]["content"]


def test_expressions_and_grammars_bind_too(client):
    assert re.fullmatch("(ab)+c", answer(client, regex="(ab)+c")["message"]["content"])
    assert answer(client, grammar='start: "yes" | "no"')["message"]["content"] in ("yes", "no")
    body = {"prompt": "hello", "regex": "[0-9]{4}", **HOT}
    assert re.fullmatch("[0-9]{4}", client.post(TEXT, json=body).json()["choices"][0]["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_with_what_it_takes(client, stream):
    named = {"type": "function", "function": {"name": "greet"}}
    for choice in ("required", named):
        body = {"messages": user("hello"), **HOT, "tools": TOOLS, "tool_choice": choice, "seed": 3}
        body |= {"parallel_tool_calls": False}
        if stream:
            deltas = [chunk["choices"][0] for chunk in streamed(client, CHAT, body)[:-1]]
            calls = [call for one in deltas for call in one["delta"].get("tool_calls", ())]
            reason = deltas[-1]["finish_reason"]
        else:
            (found,) = client.post(CHAT, json=body).json()["choices"]
            calls, reason = found["message"]["tool_calls"], found["finish_reason"]
        assert reason == "tool_calls"
        (call,) = calls
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "greet":
            check(arguments)
        else:
            assert choice == "required"
            assert arguments == {}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"response_format": in_schema({"type": "nothing"})}, "nothing"),
        ({"regex": "("}, "regex"),
        ({"grammar": "start: missing"}, "missing"),
        ({"regex": "a", "grammar": 'start: "a"'}, "one of them"),
        ({"regex": "a", "tools": TOOLS, "tool_choice": "required"}, "leave out one"),
        ({"response_format": in_schema({"a": "b" * 10_000_000})}, "schema"),
        ({"logit_bias": {"a": 1}}, "no token id"),
        ({"logit_bias": {"1": 101}}, "-100 to 100"),
    ],
)
def test_what_cannot_bind_is_refused(client, body, told):
    error = refused(client, 400, CHAT, {"messages": user("hello"), **body})
    assert told in error["message"]
    assert len(error["message"]) < 700


def test_a_schema_without_end_is_refused_in_bounded_time(client):
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    refused(client, 400, CHAT, {"messages": user("hello"), "response_format": in_schema(loop)})
    assert client.post(CHAT, json={"messages": user("hello"), "max_tokens": 2}).status_code == 200


def test_a_biased_token_is_chosen(client):
    text = answer(client, logit_bias={"40": 100}, max_tokens=3, temperature=0)["message"]["content"]
    assert len(set(text)) == 1
