"""litellm from PyPI, as docs/server.md sets it up: answers, streams, tools, schemas, and its own exceptions."""

import importlib.util
import json

import pytest

from helpers.scripted_models import ARGUMENTS, TOOL
from helpers.servers import REFUSING, refusals, serving, user

pytestmark = [
    pytest.mark.slow,  # its import takes seconds
    pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="litellm is not installed"),
]


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network as it is imported
        import litellm

        yield litellm


@pytest.fixture
def complete(litellm):
    """Return what asks a server."""

    def complete(client, **options):
        where = {"model": "openai/tiny", "api_base": f"{client.base_url}/v1", "api_key": "none", "max_retries": 0}
        return litellm.completion(**{**where, **options})

    return complete


def test_an_answer_and_its_stream_are_the_same(complete, client):
    options = {"messages": user("hello"), "max_tokens": 8, "temperature": 0.8, "seed": 3}
    whole = complete(client, **options, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 8
    assert len(whole.choices[0].logprobs.content) == 8
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    *chunks, usage = complete(client, **options, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert usage.usage.completion_tokens == 8


def test_reasoning_is_apart_from_the_answer(complete, speaking):
    message = complete(speaking, messages=user("think")).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Hello")


def test_a_call_and_its_result_make_a_round_trip(complete, speaking, litellm):
    messages = user("call")
    first = complete(speaking, messages=messages, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert first.choices[0].finish_reason == "tool_calls"
    chunks = list(complete(speaking, messages=messages, tools=[TOOL], stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    last = complete(speaking, messages=messages, tools=[TOOL])
    assert last.choices[0].message.content == "Takeanumbrella"


def test_a_pydantic_model_binds_the_answer(complete, bound, person):
    answer = complete(bound, messages=user("hello"), response_format=person, max_tokens=200, temperature=1.5, seed=1)
    assert person.model_validate_json(answer.choices[0].message.content).age in (36, 45)


def test_errors_are_the_client_s_own_exceptions(complete, small, litellm):
    errors = {
        400: litellm.BadRequestError,
        401: litellm.AuthenticationError,
        404: litellm.NotFoundError,
        413: litellm.APIError,
        429: litellm.RateLimitError,
        503: litellm.ServiceUnavailableError,
    }
    options = {"messages": user("hello"), "max_tokens": 2}
    found = {}
    with serving(small, **REFUSING) as client:
        for status, word, key, fields in refusals(client):
            if "model" in fields:
                fields = {"model": f"openai/{fields['model']}"}
            with pytest.raises(errors[status], match=word) as told:
                complete(client, **{**options, **fields, "api_key": key})
            found[status] = told.value.status_code
    assert found == {status: status for status in errors}
