"""Prompts from a file: text, one a line, or the JSON lines of the common data sets and of batches."""

import json
from pathlib import Path
from typing import TypeAlias

from moeflow.batch.messages import read_messages
from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text

Prompt: TypeAlias = str | list[dict[str, str]]  # a text, or messages

_FIELDS = ("prompt", "text", "question", "turns", "messages")
_JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of a file.

    Args:
        path: a .jsonl file whose objects have "prompt", "text", "question", "turns" (the first turn is taken) or
            "messages", themselves or in the "body" of OpenAI's batches; or any other text file with one prompt a line.
            UTF-8. Blank lines are skipped.
        limit: most prompts to read.

    Returns:
        Texts, and messages with "role" and "content".

    Raises:
        ConfigError: the file is missing, holds no prompt, or a line is of another form; the line is named.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: it must be 1 or more prompts.")
    read = _json_line if path.suffix.lower() in _JSON_LINES else str.strip
    prompts: list[Prompt] = []
    try:
        with open(path, encoding="utf-8-sig") as lines:  # with or without a byte-order mark
            for number, line in enumerate(lines, 1):
                if limit is not None and len(prompts) == limit:
                    break
                if line.strip():
                    try:
                        prompts.append(read(line))
                    except ConfigError as error:
                        raise ConfigError(f"{path}, line {number}: {error}. Correct or delete the line.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of prompts.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}). Give one prompt a line, or JSON lines.") from None
    if not prompts:
        raise ConfigError(f"{path} holds no prompt. Give one prompt a line, or JSON lines in a file named .jsonl.")
    return prompts


def _json_line(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ConfigError("it is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"it is not JSON ({error})") from None
    if isinstance(entry, dict) and isinstance(entry.get("body"), dict):
        entry = entry["body"]
    values = [(name, entry[name]) for name in _FIELDS if entry.get(name) is not None] if isinstance(entry, dict) else []
    if not values:
        raise ConfigError(f"it has none of {', '.join(_FIELDS)}")
    name, value = values[0]
    if name == "messages":
        return read_messages(value)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"its {name} is no text that is not empty")
    return check_text(value, f"its {name}")
