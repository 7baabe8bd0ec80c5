"""The requests of a batch: one JSON object a line, in moeflow's own form or in that of OpenAI's batch files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moeflow.batch.messages import parse_object, read_messages, refuse_unknown, short
from moeflow.batch.openai_format import CHAT_URL, OPENAI_FIELDS, TEXT_URL, openai_sampling
from moeflow.engine.sampling_params import STRUCTURES, SamplingParams
from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_MOST_LETTERS = 500  # of an error


@dataclass(frozen=True)
class BatchRequest:
    """One line that asks for an answer.

    Args:
        number: the line, from 1.
        id: "id" or "custom_id"; "#" and the line's number where the line has none.
        url: what an OpenAI-style line asks for; None for moeflow's own form.
        content: the prompt as it is, or messages with "role" and "content", which a chat template is for.
        params: the request's sampling.
        model: what an OpenAI-style line calls the model; it is repeated in the answer and chooses nothing.
        answered_by: what else the answer depends on, such as the name of the model that is asked.
    """

    number: int
    id: str
    url: str | None
    content: str | list[dict]
    params: SamplingParams
    model: str | None = None
    answered_by: str = ""

    @property
    def digest(self) -> str:
        """Hash of content, sampling and the answering model in 16 hexadecimal digits, which the answer repeats."""
        # What is as by default is left out, so that an option that a later version adds changes no digest.
        given = ((field, getattr(self.params, field.name)) for field in fields(SamplingParams))
        sampling = {field.name: value for field, value in given if value != field.default}
        written = json.dumps([self.id, self.content, sampling, self.answered_by], sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RefusedLine:
    """One line that cannot be answered.

    Args:
        number: the line, from 1.
        id: as in a request; "#" and the line's number where it has none, or that of another line.
        url: not None for a line in OpenAI's form.
        error: what is wrong with it.
    """

    number: int
    id: str
    url: str | None
    error: str


def read_batch(
    path: str | Path, defaults: SamplingParams, answered_by: str = ""
) -> tuple[list[BatchRequest], list[RefusedLine]]:
    """Read the requests of a file; a line that is none is told apart and the others go on.

    Args:
        path: JSON lines, UTF-8. Blank lines are skipped.
        defaults: the sampling of what a line leaves open; its seed, where there is one, has the line's number added.
        answered_by: what else the answers depend on.

    Raises:
        ConfigError: the file cannot be read, or has no line that is a request.
    """
    requests: list[BatchRequest] = []
    refused: list[RefusedLine] = []
    line_of: dict[str, int] = {}
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    found = _read_line(number, line, defaults, answered_by, line_of)
                    if isinstance(found, BatchRequest):
                        requests.append(found)
                    else:
                        refused.append(found)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of JSON lines.") from error
    if not requests and not refused:
        raise ConfigError(f'{path} is empty. Give one request a line, as in {{"prompt": "Hello"}}.')
    if not requests:  # another file, or one object over many lines
        first = refused[0]
        raise ConfigError(
            f"{path} has no request in {len(refused):,} lines: line {first.number}: {first.error}. Give one request a "
            'line, as in {"prompt": "Hello"}.'
        )
    return requests, refused


def _read_line(
    number: int, line: bytes, defaults: SamplingParams, answered_by: str, line_of: dict[str, int]
) -> BatchRequest | RefusedLine:
    """Read one line, and note its id in `line_of`."""
    own_id = f"#{number}"
    url: str | None = None
    try:
        entry = parse_object(line)
        in_openai_style = entry.get("custom_id") is not None or entry.get("body") is not None
        if in_openai_style:
            url = str(entry.get("url") or "")
        given_id = _given_id(entry.get("custom_id" if in_openai_style else "id"))
        if given_id is not None:
            if given_id in line_of:
                raise ConfigError(f"its id {given_id!r} is that of line {line_of[given_id]} too; give it another")
            own_id = given_id
            line_of[given_id] = number
        if defaults.seed is not None:
            defaults = replace(defaults, seed=(defaults.seed + number) % 2**63)
        if not in_openai_style:
            refuse_unknown(entry, ("id", "prompt", "messages", *_SAMPLING), "it")
            content, params = _content(entry), _params(entry, defaults)
            return BatchRequest(number, own_id, None, content, params, answered_by=answered_by)
        body = _body(entry, number)
        wanted = "messages" if url == CHAT_URL else "prompt"
        refuse_unknown(body, (wanted, *OPENAI_FIELDS), "it")
        content, params, model = _content(body), _params(openai_sampling(body, url or ""), defaults), body.get("model")
        if model is not None and not isinstance(model, str):
            raise ConfigError(f"its model is {short(model)}; it must be a text")
        return BatchRequest(number, own_id, url, content, params, model and check_text(model, "its model"), answered_by)
    except (ConfigError, RecursionError) as error:
        told = str(error) if isinstance(error, ConfigError) else "it is nested too deeply"
        return RefusedLine(number, own_id, url, told if len(told) <= _MOST_LETTERS else f"{told[:_MOST_LETTERS]}...")


def _given_id(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"its id is {short(value)}; it must be a text")
    if value[0] == "#" and value[1:].isdigit():
        raise ConfigError(f"its id is {value!r}; # and a number stand for lines without an id, so give it another")
    return check_text(value, "its id")


def _body(entry: dict[str, Any], number: int) -> dict[str, Any]:
    refuse_unknown(entry, ("custom_id", "method", "url", "body"), "it")
    custom_id, method, url, body = (entry.get(name) for name in ("custom_id", "method", "url", "body"))
    if custom_id is None:
        raise ConfigError(f"it has no custom_id; give each line a text of its own, such as request-{number}")
    if not isinstance(custom_id, str):
        raise ConfigError(f"its custom_id is {short(custom_id)}; it must be a text, such as request-{number}")
    if method not in ("POST", None):
        raise ConfigError(f"its method is {short(method)}; it must be POST")
    if url not in (CHAT_URL, TEXT_URL):
        raise ConfigError(f"its url is {short(url)}; it must be {CHAT_URL} or {TEXT_URL}")
    if not isinstance(body, dict):
        raise ConfigError(f"its body is {short(body)}, no object")
    return body


def _content(entry: dict[str, Any]) -> str | list[dict]:
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        raise ConfigError("it must have a prompt or messages, one of them")
    if messages is not None:
        return read_messages(messages)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"its prompt is {short(prompt)}; it must be a text that is not empty")
    return check_text(prompt, "its prompt")


def _params(entry: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = {name: entry[name] for name in _SAMPLING if entry.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    if not given.keys().isdisjoint(STRUCTURES):  # the line's in place of the command's
        defaults = replace(defaults, json_schema=None, regex=None, grammar=None)
    params = replace(defaults, **given)
    for text in params.stop:
        check_text(text, "stop")
    return params
