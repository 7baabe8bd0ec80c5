"""Prompts are read from text and JSON lines, and a bad one is named by its line."""

import pytest

from moeflow.cli.prompts import read_prompts
from moeflow.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "one\n\n two \n", ["one", "two"]),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n{"question": "c"}\n{"turns": ["d", "e"]}\n', list("abcd")),
    ],
)
def test_prompts_are_read_from_text_and_json_lines(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, limit=1) == expected[:1]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": 3}', '{"turns": []}', '{"text": " "}'])
def test_a_bad_prompt_is_named_by_its_line(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts(tmp_path / "p.jsonl")


def test_files_without_prompts_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, told in (("empty.txt", "no prompt"), ("binary.txt", "UTF-8"), ("absent.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            read_prompts(tmp_path / name)
