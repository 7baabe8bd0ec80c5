"""Prompts from a file: text, one a line, or the JSON lines of the common data sets."""

import json
from pathlib import Path

from moeflow.errors import ConfigError

_FIELDS = ("prompt", "text", "question", "turns")


def read_prompts(path: str | Path, *, limit: int | None = None) -> list[str]:
    """Read the prompts of a file.

    Args:
        path: a .jsonl file whose objects have "prompt", "text", "question" or "turns" (the first turn is taken), or
            any other text file with one prompt a line. Blank lines are skipped.
        limit: most prompts to read.

    Raises:
        ConfigError: the file is missing, holds no prompt, or a line is of another form; the line is named.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: it must be 1 or more prompts.")
    prompts: list[str] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt(path, number, line) if path.suffix == ".jsonl" else line.strip())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of prompts.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}). Give one prompt a line, or JSON lines.") from None
    if not prompts:
        raise ConfigError(f"{path} holds no prompt. Give one prompt a line, or JSON lines in a file named .jsonl.")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON ({error}). Correct or delete the line.") from None
    values = [entry[name] for name in _FIELDS if name in entry] if isinstance(entry, dict) else []
    value = values[0] if values else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{path}, line {number} has none of {', '.join(_FIELDS)} with a text in it. Add one of them.")
    return value
