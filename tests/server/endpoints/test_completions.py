"""/v1/completions: texts and token ids continued, echoed and scored, as lm-eval asks for."""

import json

import pytest
import torch

from helpers.servers import TEXT, refused, streamed
from helpers.small_tokenizers import letter_tokenizer
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams

PROMPT = "the river runs"


def ids(text):
    return letter_tokenizer()(text)["input_ids"]


@pytest.fixture(scope="module")
def own(small):
    """What the engine continues the prompt with."""
    with Engine(small, letter_tokenizer()) as engine:
        (completion,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=6))
    return completion.text


def post(client, **body):
    response = client.post(TEXT, json={"max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_texts_and_token_ids_are_continued_alike(client, own):
    for prompt in (PROMPT, ids(PROMPT)):
        answer = post(client, prompt=prompt)
        assert answer["object"] == "text_completion"
        assert answer["choices"] == [{"index": 0, "text": own, "logprobs": None, "finish_reason": "length"}]


def test_each_of_several_prompts_has_its_answers_at_its_place(client, own):
    for prompts in (["a", PROMPT], [ids("a"), ids(PROMPT)]):
        answer = post(client, prompt=prompts, n=2)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] == own for choice in answer["choices"]] == [False, False, True, True]
        assert answer["usage"]["prompt_tokens"] == 1 + len(PROMPT)
        assert answer["usage"]["completion_tokens"] == 24


def test_an_answer_begins_with_its_prompt_where_that_is_asked_for(client, own):
    assert post(client, prompt=PROMPT, echo=True)["choices"][0]["text"] == PROMPT + own
    assert post(client, prompt=ids(PROMPT), echo=True)["choices"][0]["text"] == PROMPT + own
    *chunks, done = streamed(client, TEXT, {"prompt": PROMPT, "echo": True, "max_tokens": 6})
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT + own


def test_what_lm_eval_sends_gets_the_likelihood_of_every_token(client, small):
    texts = [PROMPT, "and the hills"]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(client, prompt=[ids(text) for text in texts], **asked)
    for text, choice in zip(texts, answer["choices"], strict=True):
        with torch.no_grad():
            logprobs = small(torch.tensor([ids(text)])).logits[0].log_softmax(-1)
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(text) + 1
        assert "".join(found["tokens"][:-1]) == text
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        for place, token in enumerate(ids(text)[1:]):
            own, top = found["token_logprobs"][place + 1], found["top_logprobs"][place + 1]
            assert own == pytest.approx(float(logprobs[place, token]), abs=1e-4)
            (best,) = top.values()
            assert best == pytest.approx(float(logprobs[place].max()), abs=1e-4)
            # This is how lm-eval finds out whether a token is the likeliest one.
            assert (own == best) == (int(logprobs[place].argmax()) == token)


def test_no_new_token_may_be_asked_for(client):
    answer = post(client, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["token_logprobs"]) == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == 0
    *chunks, usage, _ = streamed(
        client, TEXT, {"prompt": PROMPT, "max_tokens": 0, "stream_options": {"include_usage": True}}
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ""
    assert usage["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": PROMPT, "suffix": "."}, "suffix"),
        ({"prompt": PROMPT, "best_of": 3}, "best_of is 3"),
        ({"prompt": PROMPT, "echo": "yes"}, "echo is 'yes'"),
        ({"prompt": PROMPT, "echo": True, "logprobs": 1, "stream": True}, "cannot be streamed"),
        ({"prompt": PROMPT, "logprobs": 21}, "logprobs is 21; at most 20"),
        ({"prompt": PROMPT, "logprobs": True}, "logprobs is True"),
        ({"prompt": PROMPT, "top_logprobs": 1}, "top_logprobs"),
        ({"prompt": PROMPT, "messages": [{}]}, "'messages'"),
        ({"prompt": [200]}, "200, which is no token id"),
        ({"prompt": [[1, -1]]}, "-1, which is no token id"),
        ({"prompt": [[1, 2.0]]}, "it must be a text"),
        ({"prompt": ["a", [1]]}, "it must be a text"),
        ({"prompt": []}, "it must be a text"),
        ({"prompt": [[]]}, "the prompt has no tokens"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": {"text": "x"}}, "it must be a text"),
        ({"prompt": ["a"] * 400}, "400 prompts"),
        ({"prompt": ["a"] * 200, "n": 2}, "400 answers"),
        ({"prompt": "x" * 5000}, "4,096 positions"),
        ({"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(client, body, word):
    error = refused(client, 400, TEXT, content=json.dumps({"max_tokens": 2, **body}))
    assert word in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
