"""`moeflow chat` and `moeflow generate`: prompts that are no text are refused before a model is loaded."""

import io
import json
import sys

import pytest

from moeflow.cli.main import main

SURROGATE = "a\udcff"  # how Python gives the byte 0xff of a command line


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (["generate", "no/model"], io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"), "standard input is no UTF-8 text"),
        (
            ["generate", "no/model"],
            io.StringIO(SURROGATE),
            "prompt on standard input has '\\udcff'",
        ),
        (["generate", "no/model"], io.StringIO("\ufeff\n"), "the prompt is empty"),
        (["generate", "no/model", SURROGATE], io.StringIO(), "the prompt has '\\udcff' at character 2"),
        (["chat", "no/model", "--system", SURROGATE], io.StringIO("hi"), "--system has '\\udcff' at character 2"),
        (["generate", "no/model", "hi", "--temperature", "nan"], io.StringIO(), "temperature is nan"),
        (["generate", "no/model", "hi", "--regex", ""], io.StringIO(), "regex is ''"),
        (["chat", "no/model", "--json-schema", "no.json"], io.StringIO("hi"), "--json-schema no.json cannot be read"),
        (["chat", "no/model", "--grammar", "."], io.StringIO("hi"), "--grammar . cannot be read"),
        (["generate", "no/model", "hi", "--json-schema", __file__], io.StringIO(), "json_schema is not JSON"),
        (["generate", "no/model", "hi", "--grammar", "/dev/zero"], io.StringIO(), "grammar has 262,145 characters"),
        (["generate", "no/model", "hi", "--grammar", sys.executable], io.StringIO(), "is not UTF-8 text"),
        (["generate", "no/model", "hi", "--seed", str(2**70)], io.StringIO(), "seed is 1180591620717411303424"),
    ],
)
def test_what_is_no_text_or_no_number_is_one_line(monkeypatch, capsys, arguments, stdin, told):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_flags_of_the_engine_hold_in_generate_and_chat(speaking_folder, capsys, monkeypatch):
    def said(*flags, command="generate", prompt=("hello",)):
        assert main([command, str(speaking_folder), *prompt, "--json", "--max-new-tokens", "12", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole = said()
    stop = whole["text"][3:5]
    stopped = said("--stop", stop)
    assert (stopped["text"], stopped["stopped"]) == (whole["text"][: whole["text"].index(stop)], "eos")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    answer = said("--presence-penalty", "2", "--ignore-eos", command="chat", prompt=())
    assert answer["num_new_tokens"] == 12
    assert answer["num_cached_tokens"] == 0
