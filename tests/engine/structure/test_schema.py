"""Schemas, regular expressions and grammars as SamplingParams takes them: one form, and what is refused in one line."""

import json

import pytest

from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.structure.schema import MOST_DEPTH, MOST_LETTERS, schema_text
from moeflow.errors import ConfigError


def nested(levels):
    schema = {}
    for _ in range(levels - 1):
        schema = {"a": schema}
    return schema


def endless():
    schema = {"type": "object"}
    schema["properties"] = {"self": schema}
    return schema


def test_a_schema_is_one_text_however_it_is_given_and_keeps_the_order_of_its_fields():
    given = {"type": "object", "properties": {"b": {"enum": ["ü", 1.5]}, "a": {"type": "integer"}}}
    text = '{"type":"object","properties":{"b":{"enum":["ü",1.5]},"a":{"type":"integer"}}}'
    assert SamplingParams(json_schema=given).json_schema == text
    one, other = SamplingParams(json_schema=given), SamplingParams(json_schema=json.dumps(given, indent=2))
    assert one == other
    assert hash(one) == hash(other)
    assert one.structure == ("json_schema", text)
    assert SamplingParams(regex="a+").structure == ("regex", "a+")
    assert SamplingParams().structure is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{", "not JSON"),
        ('{"minimum": NaN}', "NaN is no number"),
        ({"minimum": float("inf")}, "cannot be written as JSON"),
        ({"enum": [object()]}, "cannot be written as JSON"),
        (endless(), "cannot be written as JSON"),
        ("[]", "list; it must be an object"),
        (7, "int; it must be an object"),
        ("", "not empty"),
        ({"enum": ["\ud800"]}, "no text"),
        (nested(MOST_DEPTH + 1), "nested too deeply"),
        (nested(500), "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "characters; at most|nested too deeply"),
        ('{"a":' * 30_000 + "1" + "}" * 30_000, "nested too deeply"),
        ({"enum": ["x" * 10_000_000]}, "characters; at most"),
        ("x" * 10_000_000, "characters; at most"),
    ],
)
def test_what_is_no_schema_or_too_large_is_refused_in_one_line(given, told):
    with pytest.raises(ConfigError, match=told) as refusal:
        SamplingParams(json_schema=given)
    assert "json_schema" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_the_deepest_and_longest_schemas_are_taken():
    assert schema_text(nested(MOST_DEPTH))
    assert len(schema_text({"enum": ["x" * (MOST_LETTERS - len('{"enum":[""]}'))]})) == MOST_LETTERS


REQUIRES_ITSELF = {"type": "object", "properties": {"v": {}, "next": {"$ref": "#"}}, "required": ["v", "next"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        REQUIRES_ITSELF,
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}, True], "minItems": 1},
        {
            "$defs": {"a/~b": {"oneOf": [REQUIRES_ITSELF, {"$ref": "#/$defs/a~1~0b"}]}},
            "allOf": [{"$ref": "#/$defs/a~1~0b"}],
        },
    ],
)
def test_a_schema_of_which_no_answer_ends_is_refused(schema):
    with pytest.raises(ConfigError, match="recurses for ever"):
        SamplingParams(json_schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]},
        {"type": "object", "properties": {"n": {"type": "array", "items": {"$ref": "#"}}}, "required": ["n"]},
        {"properties": {"next": {"$ref": "#"}}, "required": ["next"]},  # a number is an answer
        {"type": "array", "items": {"$ref": "#"}, "prefixItems": [True], "minItems": 1},
        {"$ref": "#/nowhere/0"},
        {"$ref": "https://example.com/a"},
    ],
)
def test_a_recursion_that_may_end_is_taken(schema):
    assert SamplingParams(json_schema=schema).structure


def test_a_long_chain_of_references_is_followed_in_either_order():
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)} | {"d5000": {"type": "integer"}}
    for defs in (links, dict(reversed(links.items()))):
        assert schema_text({"$defs": defs, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"regex": ""}, "^regex is ''; it must be a text that is not empty"),
        ({"regex": 3}, "^regex is 3"),
        ({"grammar": b"start"}, "^grammar is b'start'"),
        ({"grammar": "x" * (MOST_LETTERS + 1)}, "^grammar has 262,145 characters"),
        ({"regex": "\udfff"}, "^regex has"),
        ({"regex": "a", "json_schema": {}}, "^json_schema and regex are given"),
        ({"regex": "a", "json_schema": {}, "grammar": "b"}, "^json_schema and regex and grammar are given"),
    ],
)
def test_one_text_binds_an_answer_and_is_a_text_of_a_limited_length(params, told):
    with pytest.raises(ConfigError, match=told):
        SamplingParams(**params)
