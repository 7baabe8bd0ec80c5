"""The commands of docs/server.md, run by the real curl against a server on another port."""

import json
import os
import re
import shutil
import subprocess

import pytest

from helpers.paths import ROOT
from helpers.servers import serving

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
COMMANDS = re.findall(r"^ {4,6}(curl (?:.*\\\n)*.*)$", (ROOT / "docs/server.md").read_text(), re.MULTILINE)
ADDRESS = "http://127.0.0.1:8080"
KEY = "right-key"


@pytest.fixture(scope="module")
def locked(small):
    with serving(small, model_name="demo-model", api_key=KEY) as client:
        yield client


def run(client, command, **environment):
    """Return what a command writes, with an address of its own."""
    assert ADDRESS in command
    command = command.replace(ADDRESS, str(client.base_url)).replace("curl ", "curl -sS --noproxy '*' ", 1)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kind_of_command_is_there():
    assert len(COMMANDS) == 3
    assert sum(" -N " in command for command in COMMANDS) == 1
    assert sum("Authorization" in command for command in COMMANDS) == 1


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_of_the_docs_is_answered(client, locked, command):
    if "Authorization" in command:
        assert json.loads(run(locked, command, MOEFLOW_API_KEY=KEY))["data"][0]["id"] == "demo-model"
        assert json.loads(run(locked, command, MOEFLOW_API_KEY="wrong"))["error"]["code"] == "invalid_api_key"
    elif " -N " in command:
        *events, done = [line.removeprefix("data: ") for line in run(client, command).splitlines() if line]
        assert done == "[DONE]"
        assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events)
    else:
        assert json.loads(run(client, command))["usage"]["completion_tokens"] in range(1, 41)
