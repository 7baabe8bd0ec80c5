"""The openai client from PyPI, as its users call it: answers, streams, tools, schemas, and its own exceptions."""

import json

import openai
import pytest

from helpers.scripted_models import ARGUMENTS, PLACE, TOOL
from helpers.servers import REFUSING, refusals, serving, user


def client_of(client, **options):
    """Return the openai client of a server; it tries nothing again."""
    return openai.OpenAI(**{"base_url": f"{client.base_url}/v1", "api_key": "none", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def asked(client):
    with client_of(client) as asked:
        yield asked


def test_an_answer_and_its_stream_are_the_same(asked):
    options = {"model": "tiny", "messages": user("hello"), "max_completion_tokens": 8, "temperature": 0.8, "seed": 3}
    whole = asked.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 8
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = list(asked.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert stream[-1].usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    assert whole._request_id.startswith("req_")


def test_texts_are_continued(asked):
    answer = asked.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    assert len(answer.choices[0].logprobs.token_logprobs) == 4
    chunks = asked.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True)
    assert "a" + "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_extensions_go_in_the_extra_body(asked):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "priority": 2}
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 3, "temperature": 1}
    assert asked.chat.completions.create(**options, extra_body=extra).usage.completion_tokens == 3


def test_the_model_is_listed(asked):
    assert [model.id for model in asked.models.list()] == ["org/tiny"]
    assert asked.models.retrieve("tiny").id == "org/tiny"


def test_a_call_and_its_result_make_a_round_trip(speaking):
    with client_of(speaking) as asked:
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


def test_responses_are_the_newer_form_of_the_same(speaking):
    with client_of(speaking) as asked:
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
        with pytest.raises(openai.BadRequestError, match="input_file"):
            asked.responses.create(model="tiny", input=[{"role": "user", "content": [{"type": "input_file"}]}])
        cut = asked.responses.create(model="tiny", input="think", max_output_tokens=1)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize("form", ["chat", "responses"])
def test_a_pydantic_model_binds_the_answer(bound, person, form):
    options = {"model": "tiny", "temperature": 1.5}
    with client_of(bound) as asked:
        if form == "chat":
            done = asked.chat.completions.parse(
                **options, messages=user("hello"), response_format=person, max_tokens=200, seed=1
            )
            found = done.choices[0].message.parsed
        else:
            found = asked.responses.parse(
                **options, input="hello", text_format=person, max_output_tokens=200
            ).output_parsed
    assert type(found) is person


ERRORS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    404: openai.NotFoundError,
    413: openai.APIStatusError,
    429: openai.RateLimitError,
    503: openai.InternalServerError,
}


def test_errors_are_the_client_s_own_exceptions(small):
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 2}
    found = {}
    with serving(small, **REFUSING) as client:
        for status, word, key, fields in refusals(client):
            with client_of(client, api_key=key) as asked, pytest.raises(ERRORS[status], match=word) as told:
                asked.chat.completions.create(**{**options, **fields})
            found[status] = told.value
    assert {status: error.status_code for status, error in found.items()} == {status: status for status in ERRORS}
    assert all(error.request_id.startswith("req_") for error in found.values())
    assert found[400].param == "temperature"
    assert found[404].code == "model_not_found"
    assert int(found[429].response.headers["retry-after"]) >= 1


def test_an_error_in_the_middle_of_a_stream_is_an_exception(small):
    long = {"model": "tiny", "messages": user("hello"), "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    with serving(small) as client, client_of(client) as asked, asked.chat.completions.create(**long, stream=True) as s:
        next(s)
        client.app.state.service.drain(0)
        with pytest.raises(openai.APIError, match="stopping"):
            list(s)
