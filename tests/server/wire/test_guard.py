"""The guard: keys, names of hosts, pages of other sites, request ids, and what is logged."""

import logging

import pytest

from helpers.servers import CHAT, raw_socket, refused, running, serving, user
from moeflow.errors import ConfigError
from moeflow.server.app import build_app
from moeflow.server.service import Service
from moeflow.server.settings import ServerSettings

HELLO = {"messages": user("a secret prompt"), "max_tokens": 2}
KEY = "right-key"


@pytest.fixture(scope="module")
def locked(small):
    with serving(small, api_key=KEY, allowed_hosts=["box.local"], cors_origins=["https://good.example"]) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        {"x-api-key": KEY + "x"},
        {"authorization": "Bearer \xe9".encode("latin-1")},
    ],
)
def test_a_missing_or_wrong_key_is_refused_everywhere_but_at_health(locked, headers):
    error = refused(locked, 401, CHAT, HELLO, headers=headers)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for path in ("/v1/models", "/stats", "/metrics", "/nothing"):
        assert locked.get(path, headers=headers).status_code == 401
    assert locked.get("/health", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_refusal_leaves_no_connection_waiting_for_its_body(small, method):
    with serving(small, api_key=KEY, body_timeout_s=0.2) as client:
        for body, status in ((b"x" * 50_000, 401), (b"x" * 500_000, 401)):
            assert client.request(method, "/v1/models", content=body).status_code == status
        with raw_socket(client) as slow:
            slow.sendall(f"{method} /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n".encode())
            assert slow.makefile("rb").read().startswith(b"HTTP/1.1 401")  # until the server closes
        with raw_socket(client) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
            assert slow.makefile("rb").read().startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("form", [("authorization", "Bearer {}"), ("authorization", "bearer  {}"), ("x-api-key", "{}")])
def test_the_key_is_taken_in_both_headers(locked, form):
    name, value = form
    assert locked.post(CHAT, json=HELLO, headers={name: value.format(KEY)}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8080", 200), ("LOCALHOST", 200), ("127.0.0.1:9", 200), ("[::1]:8080", 200),
        ("192.168.1.4", 200), ("box.local:80", 200), ("evil.example", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("", 403), ("box.local.", 403),
    ],
)  # fmt: skip
def test_only_our_own_names_are_answered(locked, host, status):
    response = locked.get("/health", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_pages_of_other_sites_are_refused_and_named_ones_let_in(locked, client):
    key = {"x-api-key": KEY}
    for origin in ("https://evil.example", "null", "https://good.example.evil"):
        assert refused(locked, 403, CHAT, HELLO, headers={**key, "origin": origin})["code"] == "origin_not_allowed"
        assert refused(client, 403, CHAT, HELLO, headers={"origin": origin})["code"] == "origin_not_allowed"
    own = f"http://{client.base_url.host}:{client.base_url.port}"
    assert client.post(CHAT, json=HELLO, headers={"origin": own}).status_code == 200
    good = {"origin": "https://good.example"}
    response = locked.post(CHAT, json=HELLO, headers={**key, **good})
    assert response.headers["access-control-allow-origin"] == "https://good.example"
    asked = {**good, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert locked.options(CHAT, headers=asked).status_code == 200
    assert "access-control-allow-origin" not in client.post(CHAT, json=HELLO).headers
    asked = {"origin": own, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options(CHAT, headers=asked).headers


def test_paths_and_methods_that_are_not_there_are_told_in_the_same_form(client):
    assert "'/v1/nothing'" in refused(client, 404, "/v1/nothing", {})["message"]
    assert "does not take POST" in refused(client, 405, "/v1/models", {})["message"]
    assert client.get(CHAT).status_code == 405
    for path in ("/docs", "/redoc", "/openapi.json"):  # pages that would load parts from elsewhere
        assert client.get(path).status_code == 404


def test_ids_are_logged_and_prompts_only_where_asked_for(small, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(small) as client:
        id = client.post(CHAT, json=HELLO).headers["x-request-id"]
        wrong = refused(client, 400, CHAT, {**HELLO, "secret_field": 1})["request_id"]
        client.get("/a%0Ab%1B[2J")
    assert f"{id} POST {CHAT} 200" in caplog.text
    assert f"{wrong} POST {CHAT} 400" in caplog.text
    assert "\x1b" not in caplog.text
    assert "secret" not in caplog.text
    with serving(small, log_prompts=True) as client:
        client.post(CHAT, json=HELLO)
    assert "a secret prompt" in caplog.text


def test_until_the_model_is_there_all_but_health_says_how_far_loading_is():
    settings = ServerSettings()
    service = Service(settings)
    service.tell("loading the tokenizer")
    with running(build_app(service), settings) as client:
        assert client.get("/health").json()["status"] == "loading"
        for path in ("/v1/models", "/stats", "/metrics", "/nothing"):
            response = client.get(path)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert "loading the tokenizer" in response.json()["error"]["message"]
        assert refused(client, 503, CHAT, HELLO)["code"] == "loading"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "box.local"])
def test_other_machines_need_a_key_or_leave(host):
    with pytest.raises(ConfigError, match="Give --api-key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, insecure=True).api_key is None
    assert ServerSettings(host=host, api_key="k").host == host
