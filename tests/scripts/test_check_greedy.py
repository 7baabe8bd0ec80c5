"""Long answers of native steps are compared with transformers', and a wrong one is told by the exit code."""

import json

import pytest

import check_greedy
from helpers.cpu_experts import needs_library

pytestmark = [needs_library, pytest.mark.slow]


def test_the_answers_are_the_same_and_native(speaking_folder, capsys):
    assert check_greedy.main(["--model", str(speaking_folder), "--tokens", "6"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["same_tokens"], found["tokens"], found["step"]["steps"]) == (6, 6, 5)


def test_a_difference_that_is_not_allowed_is_told(speaking_folder, capsys, monkeypatch):
    monkeypatch.setattr(check_greedy, "MOST_DIFFERENCE", -1.0)
    assert check_greedy.main(["--model", str(speaking_folder), "--tokens", "3"]) == 1
