"""Answers bound by schemas: what a schema of 20 fields costs a decode step, and whether answers over HTTP validate.

Knows what is measured and printed.
"""

import argparse
import json
from collections import Counter

from bench.server.clients import CHAT, ask_all
from bench.server.process import moeflow_server
from bench.structure_cost import schema_cost

GOAL = 0.05
COST_TOKENS = 150
MOST_TOKENS = 800  # of an answer; the schemas below end all sooner
AT_ONCE = 32


def closed(**properties: dict) -> dict:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


NAME = {"type": "string", "minLength": 1, "maxLength": 12}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
FIELDS = (NAME, NUMBER, {"type": "boolean"}, {"enum": ["low", "high"]})
SCHEMAS = (
    closed(name=NAME, age=NUMBER),
    closed(kind={"enum": ["river", "city", "mountain"]}, known={"type": "boolean"}),
    closed(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    closed(scores={"type": "array", "items": NUMBER, "minItems": 1, "maxItems": 4}),
    closed(place=closed(x=NUMBER, y=NUMBER), label={"anyOf": [NAME, {"type": "null"}]}),
    closed(items={"type": "array", "items": closed(id=NUMBER, name=NAME), "minItems": 1, "maxItems": 2}),
    {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 2, "maxItems": 5},
    closed(day={"type": "string", "format": "date"}, sure={"const": True}),
    closed(a={"$ref": "#/$defs/part"}, b={"$ref": "#/$defs/part"}) | {"$defs": {"part": closed(size=NUMBER)}},
    closed(**{f"field_{number}": FIELDS[number % 4] for number in range(20)}),
)


def measure(arguments: argparse.Namespace) -> dict:
    """Return the share of a decode step that a schema takes, and how many answers validate."""
    costs = {memory: schema_cost(arguments.model, memory, COST_TOKENS) for memory in (arguments.memory, "100%")}
    bodies = [bound(number) for number in range(arguments.answers)]
    reasons: Counter[str] = Counter()
    with moeflow_server(arguments.model, "100%", arguments.threads) as server:
        for begin in range(0, len(bodies), AT_ONCE):
            part = range(begin, min(begin + AT_ONCE, len(bodies)))
            answers = ask_all(server.url, CHAT, [bodies[number] for number in part])
            reasons.update(verdict(answer.text, number) for number, answer in zip(part, answers, strict=True))
    return {
        "cost": costs,
        "goal": GOAL,
        "answers": len(bodies),
        "valid": reasons["valid"],
        "refused": {reason: count for reason, count in reasons.items() if reason != "valid"},
    }


def bound(number: int) -> dict:
    """Return the body of a request whose answer a schema binds, drawn at temperature 1."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema_of(number), "strict": True}}
    messages = [{"role": "user", "content": f"Make up record {number} and write it as JSON."}]
    return {
        "messages": messages, "response_format": form, "max_tokens": MOST_TOKENS, "temperature": 1.0, "seed": number,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def schema_of(number: int) -> dict:
    """Return the schema of a request."""
    return SCHEMAS[number % len(SCHEMAS)]


def verdict(text: str, number: int) -> str:
    """Return "valid", or why an answer is not what its schema allows."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema_of(number))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]} in {text[:80]!r}"
    return "valid"


def lines(found: dict) -> list[str]:
    """Return what is printed."""
    told = [
        f"{memory} resident: mask and commit take {cost['token_us']:.0f} us of a step of {cost['step_ms']:.1f} ms, "
        f"{cost['share']:.2%}, goal below {found['goal']:.0%}"
        for memory, cost in found["cost"].items()
    ]
    told.append(f"{found['valid']} of {found['answers']} answers over HTTP validate, goal all")
    return told + [f"  {count} times {reason}" for reason, count in found["refused"].items()]
