"""Prompts are read from text and JSON lines, and a bad one is named by its line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeflow.cli.prompts import read_prompts
from moeflow.errors import ConfigError

JSON_LINES = '{"prompt": "a"}\n{"text": "b"}\n{"question": "c"}\n{"turns": ["d", "e"]}\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "one\n\n two \n", ["one", "two"]),
        ("p.Txt", "\ufeffone\r\n{}\r\n", ["one", "{}"]),
        ("p", "\ufeff\none", ["one"]),
        ("p.jsonl", JSON_LINES, list("abcd")),
        ("p.JSONL", "\ufeff" + JSON_LINES, list("abcd")),
        ("p.ndjson", '{"prompt": null, "text": "b"}', ["b"]),
        ("p.json", '{"prompt": "a"}', ["a"]),
    ],
)
def test_prompts_are_read_from_text_and_json_lines(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, limit=1) == expected[:1]


def test_messages_are_read_as_a_batch_reads_them(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    read = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [{"messages": messages}, {"custom_id": "a", "body": {"messages": messages}}, {"body": {"prompt": "p"}}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(tmp_path / "p.jsonl") == [read, read, "p"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has none of prompt, text"),
        ("{}", "has none of prompt, text"),
        ('{"prompt": 3}', "its prompt is no text"),
        ('{"turns": []}', "its turns is no text"),
        ('{"text": " "}', "its text is no text that is not empty"),
        ('{"prompt": "\\ud800"}', "its prompt has .*half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "message 1 has 'tool_calls'"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(tmp_path, line, told):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=f"line 2: .*{told}"):
        read_prompts(tmp_path / "p.jsonl")


_NAMES = st.sampled_from(
    ["prompt", "text", "question", "turns", "messages", "body", "role", "content", "user", "\ud800"]
)
_VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | _NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.lists(_VALUES, max_size=3).map(lambda values: "\n".join(map(json.dumps, values)).encode()))
def test_any_file_has_prompts_or_is_refused(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    try:
        prompts = read_prompts(tmp_path / "p.jsonl")
    except ConfigError:
        return
    json.dumps(prompts, ensure_ascii=False).encode()


def test_files_without_prompts_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, told in (("empty.txt", "no prompt"), ("binary.txt", "UTF-8"), ("absent.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            read_prompts(tmp_path / name)
