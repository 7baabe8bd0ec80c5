"""/tokenize and /detokenize: what the tokenizer and the chat template write."""

import pytest

from helpers.servers import refused, user


def test_texts_and_messages_become_tokens_and_texts_again(client):
    found = client.post("/tokenize", json={"prompt": "a river"}).json()
    assert (found["count"], found["max_model_len"]) == (len("a river"), 4096)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "a river"}
    found = client.post("/tokenize", json={"messages": user("hi"), "model": "tiny"}).json()
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "user: hi a:"}


def test_a_text_longer_than_the_context_is_counted_whole(client):
    assert client.post("/tokenize", json={"prompt": "x" * 300_000}).json()["count"] == 300_000


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/tokenize", {}, "a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": user("b")}, "a prompt or messages"),
        ("/tokenize", {"prompt": 3}, "prompt is 3"),
        ("/tokenize", {"prompt": "x" * 1_000_001}, "1,000,000 letters"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens is 1"),
        ("/tokenize", {"prompt": "a", "truncate": 1}, "'truncate'"),
        ("/detokenize", {"tokens": "abc"}, "tokens is 'abc'"),
        ("/detokenize", {"tokens": [1, "2"]}, "'2', which is no token id"),
        ("/detokenize", {"tokens": [10**30]}, "no token id"),
    ],
)
def test_a_wrong_request_is_refused(client, path, body, word):
    assert word in refused(client, 400, path, body)["message"]
