"""The anthropic client from PyPI, as its users call it: messages, streams, tools, schemas, and its own exceptions."""

import pytest

from helpers.scripted_models import ARGUMENTS, PLACE
from helpers.servers import REFUSING, refusals, serving, user

anthropic = pytest.importorskip("anthropic")
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": PLACE}
OPTIONS = {"model": "tiny", "max_tokens": 20}


def client_of(client, **options):
    """Return the anthropic client of a server; it tries nothing again."""
    options = {"base_url": str(client.base_url), "api_key": "none", "max_retries": 0, **options}
    return anthropic.Anthropic(**options)


@pytest.fixture(scope="module")
def asked(speaking):
    with client_of(speaking) as asked:
        yield asked


def test_an_answer_and_its_stream_are_the_same(asked):
    whole = asked.messages.create(messages=user("think"), system="x", **OPTIONS)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[1].text, whole.stop_reason) == ("Hello", "end_turn")
    with asked.messages.stream(messages=user("think"), system="x", **OPTIONS) as stream:
        assert "".join(stream.text_stream) == "Hello"
        found = stream.get_final_message()
    assert found.stop_reason == whole.stop_reason
    assert [block.type for block in found.content] == [block.type for block in whole.content]
    assert found.usage.output_tokens == whole.usage.output_tokens
    assert whole._request_id.startswith("req_")
    assert asked.messages.create(messages=user("think"), model="tiny", max_tokens=1).stop_reason == "max_tokens"


def test_a_stop_sequence_is_named(asked):
    found = asked.messages.create(messages=user("think"), stop_sequences=["zz", "ll"], **OPTIONS)
    assert (found.content[-1].text, found.stop_reason, found.stop_sequence) == ("He", "stop_sequence", "ll")
    with asked.messages.stream(messages=user("think"), stop_sequences=["ll"], **OPTIONS) as stream:
        found = stream.get_final_message()
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "ll")


def test_a_call_and_its_result_make_a_round_trip(asked):
    first = asked.messages.create(messages=user("call"), tools=[TOOL], **OPTIONS)
    text, call = first.content
    assert (text.text, call.name, call.input, first.stop_reason) == ("Look:", "weather", ARGUMENTS, "tool_use")
    with asked.messages.stream(messages=user("call"), tools=[TOOL], **OPTIONS) as stream:
        found = stream.get_final_message()
    assert (found.content[1].input, found.stop_reason) == (ARGUMENTS, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
    blocks = [block.model_dump() for block in first.content]
    turns = [*user("call"), {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    last = asked.messages.create(messages=turns, tools=[TOOL], **OPTIONS)
    assert last.content[0].text == "Takeanumbrella"


def test_tokens_are_counted(asked):
    assert asked.messages.count_tokens(model="tiny", messages=user("think")).input_tokens >= 1


def test_a_pydantic_model_binds_the_answer(bound, person):
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 200, "extra_body": {"temperature": 1.5}}
    with client_of(bound) as asked:
        done = asked.messages.parse(**options, output_format=person)
        assert type(done.parsed_output) is person
        with asked.messages.stream(**options, output_format=person) as stream:
            assert type(stream.get_final_message().parsed_output) is person
        with pytest.raises(anthropic.BadRequestError, match="format of output_config is"):
            asked.messages.create(**options, output_config={"format": {"type": "regex"}})


def test_what_is_no_text_is_refused(asked):
    with pytest.raises(anthropic.BadRequestError, match="image"):
        asked.messages.create(messages=[{"role": "user", "content": [{"type": "image"}]}], **OPTIONS)


ERRORS = {
    400: (anthropic.BadRequestError, "invalid_request_error"),
    401: (anthropic.AuthenticationError, "authentication_error"),
    404: (anthropic.NotFoundError, "not_found_error"),
    413: (anthropic.RequestTooLargeError, "request_too_large"),
    429: (anthropic.RateLimitError, "rate_limit_error"),
    503: (anthropic.ServiceUnavailableError, "overloaded_error"),
}


def test_errors_are_the_client_s_own_exceptions(small):
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 2}
    found = {}
    with serving(small, **REFUSING) as client:
        for status, word, key, fields in refusals(client):
            extra = {name: fields[name] for name in fields if name == "temperature"}
            sent = {**options, **fields, "extra_body": extra}
            sent.pop("temperature", None)
            with client_of(client, api_key=key) as asked, pytest.raises(ERRORS[status][0], match=word) as told:
                asked.messages.create(**sent)
            found[status] = told.value
    for status, error in found.items():
        assert error.status_code == status
        assert error.request_id.startswith("req_")
        # the form of these errors, wherever on the way a request is refused
        assert error.body["type"] == "error"
        assert error.body["error"]["type"] == ERRORS[status][1]
    assert set(found) == set(ERRORS)
