"""The openai client from PyPI, as its users call it: answers, streams, and errors as its own exceptions."""

import openai
import pytest

from helpers.servers import serving, user


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


def test_errors_are_the_client_s_own_exceptions(asked, small):
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="temperature is -1") as told:
        asked.chat.completions.create(**{**options, "temperature": -1})
    assert told.value.param == "temperature"
    assert told.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError, match="gpt-4o") as told:
        asked.chat.completions.create(**{**options, "model": "gpt-4o"})
    assert told.value.code == "model_not_found"
    limits = {"api_key": "k", "max_batch_size": 1, "max_waiting": 0, "max_body_bytes": 10_000}
    with serving(small, **limits) as client, client_of(client, api_key="k") as keyed:
        with client_of(client) as stranger, pytest.raises(openai.AuthenticationError, match="API key"):
            stranger.models.list()
        with pytest.raises(openai.APIStatusError, match="longer than 10,000 bytes") as told:
            keyed.chat.completions.create(**{**options, "messages": user("x" * 20_000)})
        assert told.value.status_code == 413
        long = {**options, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        with keyed.chat.completions.create(**long, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError, match="under way"):
                keyed.chat.completions.create(**options)
            client.app.state.service.drain(0)
            with pytest.raises(openai.APIError, match="stopping"):  # an event in the middle of the stream
                list(stream)
        with pytest.raises(openai.InternalServerError, match="stopping") as told:
            keyed.chat.completions.create(**options)
        assert told.value.status_code == 503
