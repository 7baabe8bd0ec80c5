"""What binds an answer is compiled within limits of time and memory, and what is wrong with it is told in one line."""

import pytest

from moeflow.engine.structure.compiling import check_compiles
from moeflow.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("json_schema", '{"type":"strin"}', "Invalid type: strin"),
        ("json_schema", '{"type":"array","uniqueItems":true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("json_schema", '{"type":"string","format":"foo"}', "Unknown format: foo"),
        ("json_schema", '{"type":"integer","minimum":5,"maximum":3}', "minimum (5) is greater than maximum (3)"),
        ("json_schema", '{"$ref":"https://example.com/x.json"}', "does not fetch resources"),
        ("json_schema", '{"type":"string","pattern":"(?=a)b"}', "look-around"),
        ("regex", "a(b", "unclosed group"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "nest"),
        ("grammar", "first: 'a", "lexer error"),
        ("grammar", 'first: "a"', "start"),
        ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
        ("grammar", "start: second", 'unknown name: "second"'),
    ],
)
def test_what_is_wrong_is_told_in_one_line(kind, text, told):
    with pytest.raises(ConfigError) as refusal:
        check_compiles(kind, text)
    message = str(refusal.value)
    assert message.startswith(f"{kind} cannot be compiled: ")
    assert told in message
    assert "\n" not in message
    assert len(message) < 400


def test_what_compiles_is_taken():
    check_compiles("json_schema", '{"type":"object"}')
    check_compiles("regex", "ü+")
    check_compiles("grammar", 'start: "a" %json {"type": "integer"}')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", '{"type":"integer","multipleOf":10000019}'),  # 340 s and 5 GB without a limit
        ("grammar", "start: A\nA: " + " & ".join(f"/.*x{number}.*/" for number in range(10_000))),
    ],
)
def test_what_would_take_minutes_or_gigabytes_is_given_up(kind, text):
    with pytest.raises(ConfigError, match=f"^{kind} takes more than 4 s or 512 MiB to compile"):
        check_compiles(kind, text)
