"""/v1/chat/completions: the engine's own answers in OpenAI's form, whole and streamed."""

import pytest

from helpers.servers import CHAT, TEMPLATE, TEXT, refused, serving, streamed, user
from helpers.small_tokenizers import letter_tokenizer
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams

HELLO = {"messages": user("hello there"), "max_tokens": 12}
PROMPT = "user: hello there a:"


def own_answer(model, **params):
    """What the engine answers when it is asked directly."""
    tokenizer = letter_tokenizer()
    with Engine(model, tokenizer) as engine:
        (completion,) = engine.generate([tokenizer(PROMPT)["input_ids"]], SamplingParams(**params))
    return completion


def post(client, **body):
    response = client.post(CHAT, json={**HELLO, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_is_the_engines_own(client, small):
    answer = post(client)
    own = own_answer(small, max_new_tokens=12)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": own.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert (answer["object"], answer["model"]) == ("chat.completion", "org/tiny")
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == len(PROMPT) + 12


def test_a_stream_has_the_same_text_and_ends_with_usage(client, small):
    *chunks, usage, done = streamed(client, CHAT, {**HELLO, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == own_answer(small, max_new_tokens=12).text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12


def test_each_answer_has_a_seed_of_its_own(client, small):
    sampling = {"temperature": 1.5, "seed": 7}
    answer = post(client, n=3, **sampling)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    own = [own_answer(small, max_new_tokens=12, temperature=1.5, top_k=50, seed=7 + n).text for n in range(3)]
    assert texts == own
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(PROMPT), 36)
    pieces = {0: "", 1: "", 2: ""}
    for chunk in streamed(client, CHAT, {**HELLO, "n": 3, **sampling})[:-1]:
        (choice,) = chunk["choices"]
        pieces[choice["index"]] += choice["delta"].get("content", "")
    assert list(pieces.values()) == own


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_engine(client, small, stream):
    wanted = {"logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = [chunk["choices"][0]["logprobs"] for chunk in streamed(client, CHAT, {**HELLO, **wanted})[:-1]]
        found = [entry for logprobs in chunks if logprobs for entry in logprobs["content"]]
    else:
        found = post(client, **wanted)["choices"][0]["logprobs"]["content"]
    own = own_answer(small, max_new_tokens=12, logprobs=3)
    assert own.logprobs is not None
    # What is kept of the prompt was computed in another pass, so that the last bits may differ.
    assert [entry["logprob"] for entry in found] == pytest.approx([logprob for logprob, _ in own.logprobs], abs=1e-4)
    for entry, (_, likeliest) in zip(found, own.logprobs, strict=True):
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == pytest.approx([logprob for _, logprob in likeliest], abs=1e-4)


def test_a_stop_string_ends_an_answer(client, small):
    text = own_answer(small, max_new_tokens=12).text
    answer = post(client, stop=text[4:6])
    assert answer["choices"][0]["message"]["content"] == text[: text.index(text[4:6])]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_parts_of_a_content_and_the_role_developer_are_read(client):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " there"}]
    assert post(client, messages=[{"role": "user", "content": parts}])["usage"]["prompt_tokens"] == len(PROMPT)
    answer = post(client, messages=[{"role": "developer", "content": "x"}, *user("hello there")])
    assert answer["usage"]["prompt_tokens"] == len("system: x ") + len(PROMPT)


def test_without_a_length_an_answer_may_fill_the_context(small):
    with serving(small, context=60) as client:
        answer = client.post(CHAT, json={"messages": user("hello there"), "ignore_eos": True}).json()
        assert answer["usage"]["completion_tokens"] == 60 - len(PROMPT) + 1
        error = refused(client, 400, CHAT, {"messages": user("x" * 60)})
        assert error["code"] == "context_length_exceeded"
        assert "60 positions" in error["message"]


def test_the_model_is_known_by_its_name_and_its_last_part(client):
    assert post(client, model="org/tiny")
    assert post(client, model="tiny")
    error = refused(client, 404, CHAT, {**HELLO, "model": "gpt-4o"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert client.get("/v1/models").json()["data"][0]["id"] == "org/tiny"
    assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{% for m in messages %}{{ m.update({'content': cycler.__init__.__globals__.os.getcwd()}) }}{% endfor %}",
    ],
)
def test_a_template_that_reaches_out_of_its_sandbox_is_the_error_of_its_request(small, escape):
    with serving(small, letter_tokenizer(chat_template=escape + TEMPLATE)) as client:
        error = refused(client, 400, CHAT, HELLO)
        assert "chat template" in error["message"]
        assert "unsafe" in error["message"] or "undefined" in error["message"]
        assert client.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_without_a_template_the_texts_are_joined(small):
    with serving(small, letter_tokenizer()) as client:
        assert post(client)["usage"]["prompt_tokens"] == len("hello there")


def test_the_models_own_sampling_is_the_default(small):
    before = small.generation_config.temperature, small.generation_config.do_sample
    small.generation_config.temperature, small.generation_config.do_sample = 5.0, True
    try:
        with serving(small) as client:
            own = own_answer(small, max_new_tokens=12, temperature=5.0, top_k=50, seed=1).text
            assert post(client, seed=1)["choices"][0]["message"]["content"] == own
            assert (
                post(client, temperature=0)["choices"][0]["message"]["content"]
                == own_answer(small, max_new_tokens=12).text
            )
    finally:
        small.generation_config.temperature, small.generation_config.do_sample = before
