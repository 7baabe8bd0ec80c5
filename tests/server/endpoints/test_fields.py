"""Fields of a body: each that is wrong is refused by its name, in one line, and the server goes on."""

import json

import pytest

from helpers.servers import CHAT, refused, user

HELLO = {"messages": user("hello"), "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "word", "param"),
    [
        ({"temprature": 1}, "'temprature'", "temprature"),
        ({"functions": [{"name": "f"}]}, "'functions'", "functions"),
        ({"n": 1000}, "n is 1000; it must be 1 to 16", "n"),
        ({"n": 0}, "n is 0", "n"),
        ({"n": True}, "n is True", "n"),
        ({"n": 1.0}, "n is 1.0", "n"),
        ({"stop": ["x"] * 1000}, "stop has 1,000 texts; at most 16", "stop"),
        ({"stop": [1]}, "stop is [1]", "stop"),
        ({"stop": [""]}, "stop is ['']", "stop"),
        ({"stop": {"a": 1}}, "stop is", "stop"),
        ({"stop": "x" * 257}, "stop has a text of 257 letters; it must be 256", "stop"),
        ({"temperature": -1}, "temperature is -1", "temperature"),
        ({"temperature": "hot"}, "temperature is 'hot'", "temperature"),
        ({"temperature": 10**400}, "temperature is 1000", "temperature"),
        ({"temperature": float("nan")}, "temperature is nan", "temperature"),
        ({"temperature": [[]]}, "temperature is [[]]", "temperature"),
        ({"top_p": 0}, "top_p is 0", "top_p"),
        ({"top_p": 1.5}, "top_p is 1.5", "top_p"),
        ({"top_k": -1}, "top_k is -1", "top_k"),
        ({"min_p": 2}, "min_p is 2", "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0", "repetition_penalty"),
        ({"presence_penalty": "x"}, "presence_penalty is 'x'", "presence_penalty"),
        ({"seed": -1}, "seed is -1", "seed"),
        ({"seed": 1.5}, "seed is 1.5", "seed"),
        ({"max_tokens": -3}, "max_tokens is -3", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5", "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "give one", "max_tokens"),
        ({"logprobs": 3}, "logprobs is 3", "logprobs"),
        ({"top_logprobs": 3}, "wants logprobs: true", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; at most 20", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs is -1", "logprobs"),
        ({"stream": "yes"}, "stream is 'yes'", "stream"),
        ({"stream": 1}, "stream is 1", "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams", "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "'usage'", "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage is 1", None),
        ({"stream": True, "stream_options": 3}, "stream_options is 3", "stream_options"),
        ({"priority": "high"}, "priority is 'high'", "priority"),
        ({"response_format": "json"}, "response_format is 'json'", "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format is", "response_format"),
        ({"response_format": {"type": "text", "a": 1}}, "'a'", "response_format"),
        ({"messages": []}, "messages are []", "messages"),
        ({"messages": "hi"}, "messages are 'hi'", "messages"),
        ({"messages": None}, "messages are None", "messages"),
        ({"messages": [3]}, "message 1 is 3", None),
        ({"messages": [{"role": "user"}]}, "message 1 has None as content", None),
        ({"messages": [{"role": "king", "content": "x"}]}, "role 'king'", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads no images", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "only text", None),
        ({"messages": [{"role": "system", "content": "x"}]}, "none of a user", "messages"),
        ({"messages": user("x") * 3000}, "messages are 3,000; it must be 2,048 at most", None),
        ({"messages": user("\ud800")}, "surrogate", None),
        ({"messages": user("x" * 300_000)}, "4,096 positions", "messages"),
        ({"model": 3}, "'3' is not served here", "model"),
        ({"model": {"a": []}}, "is not served here", "model"),
    ],
)
def test_a_wrong_field_is_named(client, body, word, param):
    status = 404 if "model" in body else 400
    error = refused(client, status, CHAT, content=json.dumps({**HELLO, **body}))
    assert word in error["message"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert len(error["message"]) < 700


def test_null_and_what_openai_only_stores_has_no_effect(client):
    extra = {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "prompt_cache_key": "y"}
    nothing = {"temperature": None, "stop": None, "tools": [], "stream_options": None, "logit_bias": None, "n": None}
    plain = client.post(CHAT, json=HELLO).json()["choices"]
    answer = client.post(CHAT, json={**HELLO, **extra, **nothing, "response_format": {"type": "text"}}).json()
    assert answer["choices"] == plain


def test_a_stream_that_cannot_begin_is_refused_with_its_status(client):
    assert "n is 99" in refused(client, 400, CHAT, {**HELLO, "stream": True, "n": 99})["message"]
