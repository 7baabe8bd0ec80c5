"""Fields of a body: checked one by one, and turned into the sampling of each answer.

Knows OpenAI's fields and SamplingParams. Knows nothing of prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.batch.openai_format import OPENAI_FIELDS, openai_sampling
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.scheduler import MAX_PRIORITY
from moeflow.errors import ConfigError
from moeflow.hf.encoding import check_text
from moeflow.server.wire.errors import HttpError

if TYPE_CHECKING:
    from moeflow.server.settings import ServerSettings

_SAMPLING = {field.name for field in fields(SamplingParams)}
_OF_THE_CALL = ("stream_options", "priority")
_WITHOUT_EFFECT = ("safety_identifier", "prompt_cache_key")
_MAX_STOP_LETTERS = 256  # each token of an answer is compared with each beginning of each
_NAMED_EARLY = 4  # words of an error, among which the field's name is


@dataclass(frozen=True)
class CallFields:
    """What a body says beside its prompt.

    Args:
        sampling: fields of SamplingParams that are given; "max_new_tokens" may be 0.
        num_answers: to each prompt.
        stream: whether outputs are sent as they come.
        include_usage: whether a stream ends with the numbers of tokens.
        priority: higher ones go first.
    """

    sampling: dict[str, Any]
    num_answers: int
    stream: bool
    include_usage: bool
    priority: int


@contextmanager
def told(body: dict[str, Any]) -> Iterator[None]:
    """Turn what is wrong with a body into an error of HTTP that names the field, where it is one."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        param = next((word for word in re.findall(r"\w+", message)[:_NAMED_EARLY] if word in body), None)
        raise HttpError(400, message if message.endswith(".") else f"{message}.", param=param) from None


def read_fields(body: dict[str, Any], url: str, own: tuple[str, ...], settings: ServerSettings) -> CallFields:
    """Read what a body of /v1/chat/completions or /v1/completions says beside its prompt.

    Args:
        body: the request's.
        url: which of the two.
        own: the fields that only this one has.
        settings: the limits.

    Raises:
        HttpError: 400, a field is unknown, has another type, or is beyond its limit; the message names it.
    """
    with told(body):
        refuse_unknown(body, (*own, *OPENAI_FIELDS, *_OF_THE_CALL, *_WITHOUT_EFFECT), "the request")
        given = {name: value for name, value in body.items() if value is not None}
        stream = _checked(given, "stream", False, lambda value: isinstance(value, bool), "true or false")
        most = settings.max_answers
        num_answers = _checked(given, "n", 1, lambda n: type(n) is int and 1 <= n <= most, f"1 to {most} answers")
        priority = _checked(
            given,
            "priority",
            0,
            lambda value: type(value) is int and abs(value) <= MAX_PRIORITY,
            f"a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}",
        )
        sampling = openai_sampling({name: given[name] for name in given if name not in ("n", "stream")}, url)
        sampling = {name: value for name, value in sampling.items() if value is not None}
        _check_stop(sampling.get("stop"), settings.max_stop_strings)
        top = sampling.get("logprobs")
        if type(top) is int and top > settings.max_top_logprobs:
            raise ConfigError(
                f"{'top_logprobs' if 'top_logprobs' in given else 'logprobs'} is {top}; at most "
                f"{settings.max_top_logprobs} tokens are reported with each"
            )
        wanted = sampling.pop("max_new_tokens", None)
        if wanted is not None:
            name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
            if type(wanted) is not int or wanted < 0:
                raise ConfigError(f"{name} is {short(wanted)}; it must be a whole number, 0 or more")
        SamplingParams(**sampling)  # checks
        if wanted is not None:
            sampling["max_new_tokens"] = wanted
        return CallFields(sampling, num_answers, stream, _include_usage(given, stream), priority)


def each_seed(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Return the sampling of each of several answers: a seed of its own, where one is given."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + number) % 2**63) for number in range(count)]


def _checked(given: dict[str, Any], name: str, default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    value = given.get(name, default)
    if not holds(value):
        raise ConfigError(f"{name} is {short(value)}; it must be {allowed}")
    return value


def _check_stop(stop: object, most: int) -> None:
    if stop is None:
        return
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop is {short(stop)}; it must be a text, or a list of texts, none of them empty")
    if len(stop) > most:
        raise ConfigError(f"stop has {len(stop):,} texts; at most {most} are looked for")
    for text in stop:
        if len(check_text(text, "stop")) > _MAX_STOP_LETTERS:
            raise ConfigError(f"stop has a text of {len(text):,} letters; it must be {_MAX_STOP_LETTERS:,} at most")


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ConfigError(f"stream_options is {short(options)}; it must be an object")
    if not stream:
        raise ConfigError("stream_options is for streams: give stream: true as well")
    refuse_unknown(options, ("include_usage", "include_obfuscation"), "stream_options")
    return bool(_checked(options, "include_usage", False, lambda value: isinstance(value, bool), "true or false"))
