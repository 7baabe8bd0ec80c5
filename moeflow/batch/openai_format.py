"""OpenAI's forms: the body of a request, the body of a response, and the line of a batch's output file.

Knows JSON objects, SamplingParams and completions. Knows nothing of files or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from moeflow.engine.request import Completion

# (token id, log-probability, the likeliest tokens with theirs) of each token
Logprobs = list[tuple[int, float | None, list[tuple[int, float]]]]

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_NOT_IN_OPENAI = ("max_new_tokens", "logprobs", "prompt_logprobs")  # these have another name or meaning there
_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier")
OPENAI_FIELDS = (
    *(name for name in _SAMPLING if name not in _NOT_IN_OPENAI),
    *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format", "n", "stream"),
    *_WITHOUT_EFFECT,
)


def openai_sampling(body: dict[str, Any], url: str) -> dict[str, Any]:
    """Return a body's sampling under the names of SamplingParams.

    Raises:
        ConfigError: the body asks for several answers or a stream, says one thing in two ways, its logprobs are not of
            the form of its URL, or its response_format is none.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, only in (("n", 1), ("stream", False)):
        if name in given and (given[name] != only or type(given[name]) is not type(only)):
            raise ConfigError(f"{name} is {short(given[name])}; a batch has only {only!r}")
    sampling = {name: given[name] for name in _SAMPLING if name not in _NOT_IN_OPENAI and name in given}
    lengths = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        raise ConfigError(f"max_tokens is {short(lengths[0])} and max_completion_tokens {short(lengths[1])}; give one")
    if lengths:
        sampling["max_new_tokens"] = lengths[0]
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    schema = _response_schema(given.get("response_format"))
    if schema is not None:
        if "json_schema" in sampling:
            raise ConfigError("it has response_format and json_schema; give one")
        sampling["json_schema"] = schema
    wanted = given.get("logprobs")
    if url == CHAT_URL:
        if wanted is not None and not isinstance(wanted, bool):
            raise ConfigError(f"logprobs is {short(wanted)}; for {CHAT_URL} it must be true or false")
        if "top_logprobs" in given and not wanted:
            raise ConfigError(f"top_logprobs is {short(given['top_logprobs'])}, which wants logprobs: true beside it")
        if wanted:
            sampling["logprobs"] = given.get("top_logprobs", 0)
    else:
        if "top_logprobs" in given:
            raise ConfigError(f"it has top_logprobs, which is for {CHAT_URL}; give logprobs a number")
        sampling["logprobs"] = wanted
    return sampling


def _response_schema(given: object) -> dict[str, Any] | None:
    """Return the JSON schema that a response_format asks for; None where any text will do."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(given, dict) or kind not in ("text", "json_object", "json_schema"):
        raise ConfigError(
            f'response_format is {short(given)}; it must be {{"type": "text"}}, {{"type": "json_object"}} or '
            '{"type": "json_schema", "json_schema": {"name", "schema"}}'
        )
    refuse_unknown(given, ("type", "json_schema") if kind == "json_schema" else ("type",), "response_format")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    about = given.get("json_schema")
    if not isinstance(about, dict) or not isinstance(about.get("schema"), dict):
        raise ConfigError(f'response_format has {short(about)} as json_schema; it must be {{"name", "schema"}}')
    refuse_unknown(about, ("name", "description", "schema", "strict"), "json_schema of response_format")
    schema: dict[str, Any] = about["schema"]
    return schema


def response_body(
    completion: Completion, *, id: str, model: str | None, in_chat: bool, decode: Callable[[int], str]
) -> dict[str, Any]:
    """Return the response to one request.

    Args:
        completion: finished by "stop" or "length".
        id: the response's name.
        model: what the request called the model.
        in_chat: whether the request had messages.
        decode: returns a token id's text, for log-probabilities.
    """
    num_prompt, num_new = len(completion.prompt_ids), len(completion.token_ids)
    choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason}
    if in_chat:
        choice |= {"message": {"role": "assistant", "content": completion.text}}
    else:
        choice |= {"text": completion.text}
    choice["logprobs"] = None
    if completion.logprobs is not None:
        choice["logprobs"] = (chat_logprobs if in_chat else text_logprobs)(token_logprobs(completion), decode)
    return {
        "id": id,
        "object": "chat.completion" if in_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new},
    }


def batch_record(
    number: int, custom_id: str, *, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return one line of an output file, with a response or an error.

    Args:
        number: the request's line in the input, from 1.
        custom_id: the request's name.
        response: status code, request id and body.
        error: code and message.
    """
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}


def token_logprobs(completion: Completion) -> Logprobs:
    """Return (token id, log-probability, the likeliest tokens with theirs) of each token of a completion."""
    assert completion.logprobs is not None, "its request asked for none"
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [(token_id, logprob, top) for token_id, (logprob, top) in pairs]


def prompt_logprobs(completion: Completion) -> Logprobs:
    """Return the same of each token of a completion's prompt; nothing is known of the first."""
    assert completion.prompt_logprobs is not None, "its request asked for none"
    pairs = zip(completion.prompt_ids, completion.prompt_logprobs, strict=True)
    return [(token_id, *(found or (None, []))) for token_id, found in pairs]


def chat_logprobs(logprobs: Logprobs, decode: Callable[[int], str]) -> dict[str, Any]:
    """Return log-probabilities in the form of an answer to messages."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": decode(token_id), "logprob": logprob, "bytes": None}

    return {"content": [{**entry(i, p), "top_logprobs": [entry(*each) for each in top]} for i, p, top in logprobs]}


def text_logprobs(logprobs: Logprobs, decode: Callable[[int], str]) -> dict[str, Any]:
    """Return log-probabilities in the form of a continued text."""
    return {
        "tokens": [decode(token_id) for token_id, _, _ in logprobs],
        "token_logprobs": [logprob for _, logprob, _ in logprobs],
        "top_logprobs": [{decode(token_id): logprob for token_id, logprob in top} for _, _, top in logprobs],
    }
