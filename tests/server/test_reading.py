"""Reasoning and tools over HTTP, with the real clients: a round trip of a call and its result, in each form."""

import json

import pytest

from helpers.scripted_models import scripted
from helpers.servers import CHAT, refused, serving, streamed, user

SCRIPTS = {
    "think": ["<think>", "hm", "</think>", "Hello"],
    "call": ["Look:", "<tool_call>", '{"name":"weather","arguments":{"place":"Rome"}}', "</tool_call>"],
    "Rain.": ["Take", "an", "umbrella"],
}
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PLACE}}
ARGUMENTS = {"place": "Rome"}


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
    assert "text" in refused(client, 400, CHAT, {"messages": [{"role": "user", "content": content}]})["message"]


def test_the_openai_client_makes_a_round_trip(client):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as asked:
        messages = user("call")
        answer = asked.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0].message
        (call,) = answer.tool_calls
        assert json.loads(call.function.arguments) == ARGUMENTS
        messages += [answer, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
        last = asked.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0]
        assert last.message.content == "Takeanumbrella"
        with asked.chat.completions.stream(model="tiny", messages=user("call"), tools=[TOOL]) as stream:
            found = stream.get_final_completion().choices[0]
        assert found.finish_reason == "tool_calls"
        assert found.message.tool_calls[0].function.name == "weather"


FLAT_TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": PLACE}


def test_responses_of_the_openai_client(client):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as asked:
        answer = asked.responses.create(model="tiny", input="think", instructions="x")
        assert answer.output_text == "Hello"
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.usage.output_tokens_details.reasoning_tokens == 1
        first = asked.responses.create(model="tiny", input="call", tools=[FLAT_TOOL])
        message, call = first.output
        assert (message.content[0].text, call.name, json.loads(call.arguments)) == ("Look:", "weather", ARGUMENTS)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        items = [{"role": "user", "content": "call"}, message.model_dump(), call.model_dump(), result]
        last = asked.responses.create(model="tiny", input=items, tools=[FLAT_TOOL])
        assert last.output_text == "Takeanumbrella"
        for text, whole in (("think", answer), ("call", first)):
            tools = {"tools": [FLAT_TOOL]} if text == "call" else {}
            with asked.responses.stream(model="tiny", input=text, **tools) as stream:
                numbers = [event.sequence_number for event in stream]
                found = stream.get_final_response()
            assert numbers == list(range(len(numbers)))
            assert found.status == "completed"
            assert found.output_text == whole.output_text
            assert [item.type for item in found.output] == [item.type for item in whole.output]
        with pytest.raises(openai.BadRequestError, match="nothing is stored"):
            asked.responses.create(model="tiny", input="x", previous_response_id="resp_1")
        with pytest.raises(openai.BadRequestError, match="input_image"):
            asked.responses.create(model="tiny", input=[{"role": "user", "content": [{"type": "input_image"}]}])
        cut = asked.responses.create(model="tiny", input="think", max_output_tokens=1)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_messages_of_the_anthropic_client(client):
    anthropic = pytest.importorskip("anthropic")
    tool = {"name": "weather", "description": "Tells it.", "input_schema": PLACE}
    options = {"model": "tiny", "max_tokens": 20}
    with anthropic.Anthropic(base_url=str(client.base_url), api_key="none") as asked:
        answer = asked.messages.create(messages=user("think"), system="x", **options)
        assert [block.type for block in answer.content] == ["thinking", "text"]
        assert (answer.content[1].text, answer.stop_reason) == ("Hello", "end_turn")
        first = asked.messages.create(messages=user("call"), tools=[tool], **options)
        text, call = first.content
        assert (text.text, call.name, call.input, first.stop_reason) == ("Look:", "weather", ARGUMENTS, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
        blocks = [block.model_dump() for block in first.content]
        turns = [*user("call"), {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
        last = asked.messages.create(messages=turns, tools=[tool], **options)
        assert last.content[0].text == "Takeanumbrella"
        for text, whole in (("think", answer), ("call", first)):
            tools = {"tools": [tool]} if text == "call" else {}
            with asked.messages.stream(messages=user(text), **tools, **options) as stream:
                found = stream.get_final_message()
            assert found.stop_reason == whole.stop_reason
            assert [block.type for block in found.content] == [block.type for block in whole.content]
            assert found.usage.output_tokens == whole.usage.output_tokens
        assert found.content[1].input == ARGUMENTS
        assert asked.messages.count_tokens(model="tiny", messages=user("think")).input_tokens >= 1
        cut = asked.messages.create(messages=user("think"), model="tiny", max_tokens=1)
        assert cut.stop_reason == "max_tokens"
        with pytest.raises(anthropic.BadRequestError, match="image"):
            asked.messages.create(messages=[{"role": "user", "content": [{"type": "image"}]}], **options)
        with pytest.raises(anthropic.NotFoundError):
            asked.messages.create(messages=user("think"), model="claude", max_tokens=1)


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
