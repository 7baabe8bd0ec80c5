"""`moeflow serve` as a user runs it: loading, the openai client, signals, and what is refused before anything loads."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import openai
import pytest

from helpers.paths import ROOT
from helpers.servers import CHAT, events, user
from helpers.vision_models import image_part, picture, vision_model
from moeflow.cli.main import main
from moeflow.cli.serve import _Signals, _Terminated

LONG = {"messages": user("hello"), "ignore_eos": True, "stream": True}


class Log:
    """What a process writes to its standard error, read by a thread so that the process never waits for a reader."""

    def __init__(self):
        self.text = ""
        self._changed = threading.Condition()

    def follow(self, pipe):
        """Read until the process ends."""
        for line in pipe:
            with self._changed:
                self.text += line
                self._changed.notify_all()

    def wait_for(self, words):
        """Return once these words have been written."""
        with self._changed:
            assert self._changed.wait_for(lambda: words in self.text, 60), self.text


@pytest.fixture
def log():
    """What the server of a test writes."""
    return Log()


@contextmanager
def serve(log, folder, *options):
    """Start a server; yields the process and a client of it, while the model loads."""
    command = [sys.executable, "-m", "moeflow", "serve", str(folder), "--port", "0", "--expert-memory", "50%"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--step", "python", *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    reader = threading.Thread(target=log.follow, args=(process.stderr,))
    with process:
        reader.start()
        try:
            log.wait_for("is loading")
            with httpx.Client(base_url=log.text.split()[1], timeout=60, trust_env=False) as client:
                yield process, client
        finally:
            process.kill()
            reader.join()


@pytest.mark.slow
def test_the_openai_client_is_answered_and_sigterm_lets_the_answer_finish(log, speaking_folder):
    with serve(log, speaking_folder) as (process, client):
        assert client.get("/health").json()["status"] == "loading"
        early = client.post(CHAT, json=LONG)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert "seconds so far" in early.json()["error"]["message"]
        assert int(early.headers["retry-after"]) >= 1
        log.wait_for("answers for model")
        asked = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in asked.models.list()] == ["model"]
        answer = asked.chat.completions.create(model="model", messages=user("hello"), max_completion_tokens=5)
        assert answer.usage.completion_tokens == 5
        with client.stream("POST", CHAT, json={**LONG, "max_tokens": 100}) as response:
            coming = events(response)
            next(coming)
            process.send_signal(signal.SIGTERM)
            *_, last = coming
        assert last == "[DONE]"
        assert process.wait(60) == 0
    assert "Traceback" not in log.text


@pytest.mark.slow
def test_a_checkpoint_with_a_processor_is_shown_images_by_the_openai_client(log, tmp_path):
    model, processor = vision_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with serve(log, tmp_path) as (process, client):
        log.wait_for("answers for")
        asked = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        text, shown = {"type": "text", "text": "see"}, image_part(picture(0))
        used = []
        for content in ([text], [text, shown]):
            messages = [{"role": "user", "content": content}]
            answer = asked.chat.completions.create(model=tmp_path.name, messages=messages, max_completion_tokens=3)
            used.append(answer.usage.prompt_tokens)
        assert used[1] == used[0] + 17  # 15 of the image, its begin and its end
        shown["image_url"]["url"] = "https://example.org/a.png"
        with pytest.raises(openai.BadRequestError, match="fetches nothing"):
            asked.chat.completions.create(model=tmp_path.name, messages=messages)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in log.text


@pytest.mark.slow
def test_ctrl_c_ends_answers_that_do_not_finish_with_an_error_event(log, speaking_folder):
    with serve(log, speaking_folder, "--grace", "0", "--api-key", "k") as (process, client):
        log.wait_for("answers for model")
        assert client.get("/v1/models").status_code == 401
        with client.stream("POST", CHAT, json=LONG, headers={"x-api-key": "k"}) as response:
            coming = events(response)
            next(coming)
            process.send_signal(signal.SIGINT)
            *_, last = coming
        assert last == "[DONE]" or last["error"]["code"] == "stopping"
        assert process.wait(60) == 130
    assert log.text.splitlines()[-1] == "moeflow: interrupted"
    assert "Traceback" not in log.text


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_the_model_loads_ends_the_server(log, speaking_folder, signal_number, code):
    with serve(log, speaking_folder) as (process, client):
        assert client.get("/health").json()["status"] == "loading"
        process.send_signal(signal_number)
        assert process.wait(60) == code
    assert "Traceback" not in log.text


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_server_at_once(log, speaking_folder):
    with serve(log, speaking_folder, "--grace", "600", "--context", "256") as (process, client):
        log.wait_for("answers for model")
        with client.stream("POST", CHAT, json={**LONG, "n": 16}) as response:
            coming = events(response)
            next(coming)
            process.send_signal(signal.SIGINT)
            log.wait_for("may finish within 600 seconds")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            coming.close()
    assert "Traceback" not in log.text


def test_a_port_in_use_is_one_line(speaking_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(speaking_folder), "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moeflow: port {port} of 127.0.0.1 is in use")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--host", "0.0.0.0"], "Give --api-key (or MOEFLOW_API_KEY), or --insecure"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "cannot be bound"),
        (["--port", "70000"], "0 to 65535"),
        (["--port", "-1"], "0 to 65535"),
        (["--max-batch-size", "0"], "max_batch_size is 0"),
        (["--max-step-tokens", "31"], "max_step_tokens is 31; it must be a whole number, at least max_batch_size (32)"),
        (["--max-waiting", "-1"], "max_waiting is -1"),
        (["--context", "1"], "context is 1"),
        (["--grace", "-1"], "grace_s is -1"),
        (["--grace", "nan"], "grace_s is nan"),
        (["--kv-memory", "much"], "--kv-memory"),
        (["--kv-memory", "50%"], "a share of nothing"),
        (["--kept-disk", "much"], "--kept-disk"),
        (["--api-key", ""], "API key is empty"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_loads(tmp_path, capsys, options, word):
    assert main(["serve", str(tmp_path / "nowhere"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_a_model_that_cannot_be_loaded_closes_the_port_and_is_one_line(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert "is loading" in first
    url = httpx.URL(first.split()[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((url.host, url.port))
    assert "nowhere" in last


def test_the_key_of_the_environment_is_taken(monkeypatch):
    from moeflow.cli.main import _parser
    from moeflow.cli.serve import _settings

    monkeypatch.setenv("MOEFLOW_API_KEY", "from-outside")
    assert _settings(_parser().parse_args(["serve", "m", "--host", "0.0.0.0"]), "m").api_key == "from-outside"
    assert _settings(_parser().parse_args(["serve", "m", "--api-key", "own"]), "org/m").api_key == "own"
    assert json.dumps(_settings(_parser().parse_args(["serve", "m"]), "/a/b/m").model_name) == '"m"'


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, _Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_code_of_another_swallows_is_not_lost(number, kind):
    with _Signals() as signals:
        signals.check()
        with contextlib.suppress(KeyboardInterrupt):  # as a library does in a finaliser
            signal.raise_signal(number)
        with pytest.raises(kind):
            signals.wait()
