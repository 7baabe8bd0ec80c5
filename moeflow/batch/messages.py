"""A request as JSON and its messages: a role and a text each; whatever else one holds is refused by its name."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection
from typing import Any

from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text

ROLES = ("system", "user", "assistant")
IMAGE_PART = "image_url"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def short(value: object) -> str:
    """Return a value as an error shows it, whatever its size and depth."""
    return _REPR.repr(value)


def refuse_unknown(entry: dict[str, Any], allowed: Collection[str], owner: str) -> None:
    """Refuse fields that would have no effect; null, an empty list and an empty object say nothing.

    Args:
        entry: an object of the file.
        allowed: the fields that are read.
        owner: how an error calls the object.

    Raises:
        ConfigError: there is one; the message names it and what is allowed.
    """
    unknown = [name for name, value in entry.items() if name not in allowed and value not in (None, [], {})]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ConfigError(f"{owner} has {', '.join(map(short, unknown[:5]))}{more}; known are {', '.join(allowed)}")


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object that a request is written as, UTF-8 with or without a byte-order mark.

    Raises:
        ConfigError: it is no JSON, no object, nested too deeply, or one of its objects has a field twice.
    """
    try:
        entry = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError:
        raise ConfigError("it is not JSON that can be read: it is nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"it is not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ConfigError(f'it is JSON but no object; write {{"prompt": ...}}, found {type(entry).__name__}')
    return entry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, of which no field may be there twice: one of the two would be dropped."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigError(f"it has the field {short(max(names, key=names.count))} twice; give it once")
    return entry


def read_messages(
    messages: object, read_image: Callable[[str, dict[str, Any]], Any] | None = None
) -> list[dict[str, Any]]:
    """Return messages with "role" and "content", the texts of a content's parts joined.

    Args:
        messages: what a request's "messages" hold.
        read_image: given what an error calls it and an image part of a user, returns the image; None where none are
            read. A content that has some is a list of {"type": "text", "text"} and {"type": "image", "image"}.

    Raises:
        ConfigError: no messages, none of a user with words, or one holds something that no prompt could tell; the
            message names it.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'its messages are {short(messages)}; they must be a list of {{"role", "content"}}')
    read = [_message(place, message, read_image) for place, message in enumerate(messages, 1)]
    if all(message["role"] != "user" or not _says(message["content"]) for message in read):
        raise ConfigError("its messages have none of a user with text in it")
    return read


def _says(content: str | list[dict[str, Any]]) -> bool:
    return bool(content.strip()) if isinstance(content, str) else True


def _message(place: int, message: object, read_image: Callable[[str, dict[str, Any]], Any] | None) -> dict[str, Any]:
    name = f"message {place}"
    if not isinstance(message, dict):
        raise ConfigError(f'{name} is {short(message)}; it must be {{"role", "content"}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"{name} has the role {short(role)}; it must be one of {', '.join(ROLES)}")
    refuse_unknown(message, ("role", "content"), name)
    if isinstance(content, list):
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(content, 1):
            what = f"part {number} of {name}"
            if read_image is not None and isinstance(part, dict) and part.get("type") == IMAGE_PART:
                if role != "user":
                    raise ConfigError(f"messages has an image as {what}; images can be read in messages of a user")
                parts.append({"type": "image", "image": read_image(what, part)})
            else:
                parts.append({"type": "text", "text": check_text(_part(what, part), what)})
        if any(part["type"] == "image" for part in parts):
            return {"role": role, "content": parts}
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise ConfigError(f"{name} has {short(content)} as content; only text can be read")
    return {"role": role, "content": check_text(content, name)}


def _part(name: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        found = part.get("type") if isinstance(part, dict) else part
        raise ConfigError(f"{name} is {short(found)}; only text parts can be read")
    refuse_unknown(part, ("type", "text"), name)
    if not isinstance(part.get("text"), str):
        raise ConfigError(f"{name} has {short(part.get('text'))} as text; it must be a text")
    return part["text"]
