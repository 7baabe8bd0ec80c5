"""Reasoning and tools over HTTP: apart from the text, whole and streamed. `clients/` has the round trips of clients."""

import json

import pytest

from helpers.scripted_models import ARGUMENTS, SCRIPTS, TOOL, scripted
from helpers.servers import CHAT, refused, serving, streamed, user


@pytest.fixture(scope="module")
def client():
    with serving(*scripted(SCRIPTS)) as client:
        yield client


def said(client, text, **body):
    response = client.post(CHAT, json={"messages": user(text), **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def deltas(client, text, **body):
    chunks = streamed(client, CHAT, {"messages": user(text), **body})[:-1]
    return [chunk["choices"][0] for chunk in chunks]


def test_reasoning_is_apart_from_the_answer(client):
    message = said(client, "think")["message"]
    assert message == {"role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "hm"}
    found = deltas(client, "think")
    assert "".join(one["delta"].get("reasoning_content", "") for one in found) == "hm"
    assert "".join(one["delta"].get("content", "") for one in found) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_reasoning_are_counted(client, stream):
    body = {"messages": user("think"), "stream_options": {"include_usage": True}}
    usage = streamed(client, CHAT, body)[-2] if stream else client.post(CHAT, json={"messages": user("think")}).json()
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}


def test_a_call_is_read_and_the_reason_says_so(client):
    choice = said(client, "call", tools=[TOOL])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Look:"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    found = deltas(client, "call", tools=[TOOL])
    (streamed_call,) = [call for one in found for call in one["delta"].get("tool_calls", ())]
    assert streamed_call["function"] == call["function"]
    assert found[-1]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text(client):
    for body in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = said(client, "call", **body)
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == "".join(SCRIPTS["call"])


def test_a_tool_that_is_not_offered_is_not_called(client):
    other = {"type": "function", "function": {"name": "other"}}
    assert "tool_calls" not in said(client, "call", tools=[other])["message"]


def test_what_is_wrong_with_tools_is_refused_by_name(client):
    error = refused(client, 400, CHAT, {"messages": user("call"), "tools": [TOOL, TOOL]})
    assert (error["param"], error["type"]) == ("tools", "invalid_request_error")
    assert "'weather' twice" in error["message"]
    error = refused(client, 400, CHAT, {"messages": user("call"), "tools": [TOOL], "tool_choice": "weather2"})
    assert error["param"] == "tool_choice"


def test_an_image_is_refused(client):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    assert (
        "reads no images" in refused(client, 400, CHAT, {"messages": [{"role": "user", "content": content}]})["message"]
    )


def test_errors_of_messages_have_the_form_of_their_clients(client):
    response = client.post("/v1/messages", json={"messages": user("think")})
    assert response.status_code == 400
    body = response.json()
    assert body["error"]["type"] == "invalid_request_error"
    assert "max_tokens is missing" in body["error"]["message"]


def test_a_template_without_tools_is_told_of_them_as_text():
    template = "{# <tool_call> #}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with serving(*scripted(SCRIPTS, template)) as client:
        with_tools = client.post(CHAT, json={"messages": user("call"), "tools": [TOOL]}).json()
        plain = client.post(CHAT, json={"messages": user("call")}).json()
    assert with_tools["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert with_tools["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


def test_marks_that_are_special_tokens_are_read_and_not_shown():
    words = {"go": ["<think>", "hm", "</think>", "Hello"]}
    with serving(*scripted(words, special=("<think>", "</think>"))) as client:
        message = client.post(CHAT, json={"messages": user("go")}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Hello")


def test_tokens_that_were_kept_are_counted_apart_in_each_form(client):
    text = "a long beginning " * 8 + "think"
    prompt_tokens = client.post(CHAT, json={"messages": user(text)}).json()["usage"]["prompt_tokens"]
    usage = client.post(CHAT, json={"messages": user(text)}).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == prompt_tokens - 1
    usage = client.post("/v1/messages", json={"messages": user(text), "max_tokens": 9}).json()["usage"]
    assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (cached, 1)
    usage = client.post("/v1/responses", json={"input": text}).json()["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (prompt_tokens, cached)
