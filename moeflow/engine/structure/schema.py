"""The texts that bind an answer: JSON schemas in one form, and the limits of every text before it is compiled.

Knows JSON. Knows nothing of tokens. Imports no torch, so that the command line can check what it is given.
"""

from __future__ import annotations

import json
from typing import Any

from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text

MOST_LETTERS = 1 << 18  # of a schema, a regular expression or a grammar
MOST_DEPTH = 64  # of a schema's objects and lists in each other
_MOST_SWEEPS = 64  # over the parts of a schema, to see which end

_Alternatives = list[Any]  # subschemas of which one must end


def bounded_text(text: object, name: str) -> str:
    """Return a regular expression or a grammar.

    Raises:
        ConfigError: it is no text, empty, or too long.
    """
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{name} is {text!r:.80}; it must be a text that is not empty, or None")
    if len(text) > MOST_LETTERS:
        raise ConfigError(f"{name} has {len(text):,} characters; at most {MOST_LETTERS:,} are allowed")
    return check_text(text, name)


def schema_text(schema: object) -> str:
    """Return a JSON schema as JSON text without spaces, its fields in their order.

    The order is kept since an answer has its fields in the order of the schema.

    Args:
        schema: an object, or one as JSON text.

    Raises:
        ConfigError: it is none, too long, nested too deeply, or every answer to it would hold another without end.
    """
    if isinstance(schema, str):
        bounded_text(schema, "json_schema")
        try:
            schema = json.loads(schema, parse_constant=_refuse_constant)
        except RecursionError:
            raise ConfigError(f"json_schema is nested too deeply; at most {MOST_DEPTH} levels are allowed") from None
        except ValueError as error:
            raise ConfigError(f"json_schema is not JSON ({error})") from None
    if not isinstance(schema, dict):
        raise ConfigError(
            f'json_schema is {type(schema).__name__}; it must be an object, such as {{"type": "object"}}, or its text'
        )
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise ConfigError(f"json_schema is nested too deeply; at most {MOST_DEPTH} levels are allowed") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema cannot be written as JSON ({error})") from None
    bounded_text(text, "json_schema")
    read: dict[str, Any] = json.loads(text)  # tuples are lists now, and no part stands in two places
    if _depth(read) > MOST_DEPTH:
        raise ConfigError(f"json_schema is nested too deeply; at most {MOST_DEPTH} levels are allowed")
    if not _ends(read):
        raise ConfigError("json_schema recurses for ever: every answer would hold another; make a field optional")
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    return depth


def _ends(schema: dict[str, Any]) -> bool:
    """Tell whether a schema has an answer of finite length: the least set of parts that end holds it."""
    needed: dict[int, list[_Alternatives]] = {}
    stack: list[Any] = [schema]
    while stack:
        part = stack.pop()
        if isinstance(part, dict) and id(part) not in needed:
            needed[id(part)] = _needs(schema, part)
            stack += [one for alternatives in needed[id(part)] for one in alternatives]
    ending: set[int] = set()
    for _ in range(_MOST_SWEEPS):
        num_before = len(ending)
        for part_id in reversed(needed):  # what is found last is needed by what is found first
            if all(any(id(one) in ending or not isinstance(one, dict) for one in any_of) for any_of in needed[part_id]):
                ending.add(part_id)
        if id(schema) in ending:
            return True
        if len(ending) == num_before:
            return False
    return True  # not known; an answer's length is limited anyway


def _needs(root: dict[str, Any], part: dict[str, Any]) -> list[_Alternatives]:
    """Return the parts that an answer to this one must hold: of each list one of them."""
    needs: list[_Alternatives] = []
    if isinstance(part.get("$ref"), str):
        needs.append([_target(root, part["$ref"])])
    for name in ("anyOf", "oneOf"):
        if isinstance(part.get(name), list) and part[name]:
            needs.append(part[name])
    if isinstance(part.get("allOf"), list):
        needs += [[one] for one in part["allOf"]]
    properties, required = part.get("properties"), part.get("required")
    if part.get("type") == "object" and isinstance(properties, dict) and isinstance(required, list):
        needs += [[properties[name]] for name in required if isinstance(name, str) and name in properties]
    least, first = part.get("minItems"), part.get("prefixItems")
    if part.get("type") == "array" and isinstance(least, int) and least > 0:
        first = first if isinstance(first, list) else []
        needs += [[one] for one in first[:least]]
        if least > len(first):
            needs.append([part.get("items", True)])
    return needs


def _target(root: dict[str, Any], reference: str) -> Any:
    """Return what a reference within the schema names; True, which ends, for any other."""
    if reference[:1] != "#":
        return True
    found: Any = root
    for name in reference[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return True
    return found
