"""What a hub says of a repository, and every way in which it can refuse."""

import socket

import huggingface_hub
import pytest

from helpers.hub_server import COMMIT, ID, Fault
from moeflow.errors import ModelSourceError
from moeflow.hub.repository import Repository


def on(host, fault):
    """Return a hub's fault for the requests of one host."""
    return lambda request: fault if request.host == host else None


def test_files_have_sizes_and_checksums(server):
    repository = Repository(ID)
    found = {file.name: file for file in repository.files}
    assert repository.commit == COMMIT
    assert set(found) == set(server.files)
    large, small = found["model-1.safetensors"], found["config.json"]
    assert (large.size, large.sha256, large.etag) == (9_000_000, server.sha256(large.name), server.sha256(large.name))
    assert (small.size, small.sha256, small.etag) == (25, None, server.git_id("config.json"))


def test_only_what_a_model_needs_is_wanted(server):
    wanted = {file.name for file in Repository(ID).wanted_files}
    assert wanted == {"config.json", "tokenizer.json", "empty.txt", "model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize(("begin", "length"), [(0, 10), (5_000_000, 1_000_000), (8_999_990, 100)])
def test_bytes_of_a_file_are_read_from_where_the_hub_sends_to(server, files, begin, length):
    content = files["model-1.safetensors"]
    assert Repository(ID).read("model-1.safetensors", begin, length) == content[begin : begin + length]
    assert server.sent("model-1.safetensors") == len(content[begin : begin + length])


def test_the_token_goes_to_the_hub_and_to_no_other_host(server):
    Repository(ID).read("model-1.safetensors", 0, 10)
    Repository(ID).read("config.json", 0, 10)
    sent = {
        (request.host, request.headers.get("authorization"))
        for request in server.requests
        if request.name in server.files
    }
    assert sent == {("hub", "Bearer hf_secret"), ("other", None)}


@pytest.mark.parametrize(
    ("token", "sent"), [("hf_given", "Bearer hf_given"), (False, None), (True, "Bearer hf_secret")]
)
def test_another_token_or_none_may_be_given(server, token, sent):
    assert Repository(ID, token=token).commit == COMMIT
    assert server.requests[-1].headers.get("authorization") == sent


REFUSALS = {
    "no such id": (Fault(404, {"X-Error-Code": "RepoNotFound"}), r"org/model is not at .*private.*Check the name"),
    "asked without a token": (Fault(401), r"org/model is not at .*private \(401\).*HF_TOKEN"),
    "a bad token": (
        Fault(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        r"does not accept the token \(401\).*Set HF_TOKEN to a valid one",
    ),
    "gated": (Fault(403, {"X-Error-Code": "GatedRepo"}), r"is gated.*HF_TOKEN"),
    "forbidden": (Fault(403, {"X-Error-Message": "no\r\n scope".replace("\r\n", "")}), r"\(403: no scope\)"),
    "too many requests": (Fault(429, {"Retry-After": "999"}), r"no more requests for now \(429\).*Wait some minutes"),
    "out of order": (Fault(503, {"Retry-After": "999"}), r"is out of order \(503\).*later"),
    "something else": (Fault(418), r"answers 418.*HF_ENDPOINT"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_in_one_line_with_what_to_do(server, name):
    fault, said = REFUSALS[name]
    server.fault = on("api", fault)
    with pytest.raises(ModelSourceError, match=said) as told:
        _ = Repository(ID).files
    assert "\n" not in str(told.value)
    server.fault = on("hub", fault)
    with pytest.raises(ModelSourceError):
        Repository(ID, patience_s=5).read("config.json", 0, 10)


def test_a_hub_that_is_out_of_order_for_a_moment_is_asked_again(server):
    answers = [Fault(503, {"Retry-After": "0"}), Fault(429, {"Retry-After": "0"})]
    server.fault = lambda request: answers.pop() if request.host != "other" and answers else None
    assert Repository(ID).commit == COMMIT
    answers += [Fault(503, {"Retry-After": "0"}), Fault(500)]
    assert Repository(ID).read("config.json", 0, 2) == b'{"'


def test_a_revision_that_is_gone_is_named(server):
    with pytest.raises(ModelSourceError, match=r"org/model at revision v9 is not at .*that revision is not"):
        _ = Repository(ID, "v9").files


def test_no_network_is_told(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ModelSourceError, match=rf"could not be looked up at {url}.*Check the network"):
        _ = Repository(ID, endpoint=url, patience_s=0).files
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match="HF_HUB_OFFLINE is set"):
        _ = Repository(ID).files


@pytest.mark.parametrize("id", ["a/b/c", "org/..", "-x", "org/model?x"])
def test_what_is_no_id_is_told(server, id):
    with pytest.raises(ModelSourceError, match="no id of the hub"):
        _ = Repository(id).files


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"rfilename": "../x.json"}, "lies outside the repository"),
        ({"rfilename": "/x.json"}, "lies outside the repository"),
        ({"rfilename": "a\\x.json"}, "lies outside the repository"),
        ({"size": None}, "does not tell the size and checksum"),
        ({"size": -1}, "does not tell the size and checksum"),
        ({"blobId": "../../x"}, "does not tell the size and checksum"),
    ],
)
def test_a_list_that_cannot_be_is_refused(server, lie, said):
    server.listed["config.json"] = lie
    with pytest.raises(ModelSourceError, match=said):
        _ = Repository(ID).files


def test_a_redirect_without_end_or_to_a_file_is_refused(server):
    for location, said in (
        (f"{server.url}/{ID}/resolve/x/config.json", "without end"),
        ("file:///etc/passwd", "not HTTP"),
    ):
        server.fault = on("hub", Fault(302, {"Location": location}))
        with pytest.raises(ModelSourceError, match=said):
            Repository(ID).read("config.json", 0, 2)
