"""POST /v1/completions: texts and token ids that are continued as they are.

Knows prompts and OpenAI's form of a continued text. Knows nothing of HTTP beneath bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from moeflow.batch.messages import short
from moeflow.batch.openai_format import TEXT_URL, prompt_logprobs, text_logprobs, token_logprobs
from moeflow.errors import ConfigError
from moeflow.server.endpoints.answering import Call, Usage
from moeflow.server.endpoints.fields import CallFields, each_seed, read_fields, told
from moeflow.server.wire.body import parse_body
from moeflow.server.wire.errors import HttpError
from moeflow.server.worker import Asked

if TYPE_CHECKING:
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.server.served_model import ServedModel
    from moeflow.server.service import Service

_OWN = ("prompt", "echo", "best_of")


async def create_completion(request: Request) -> Response:
    """Continue the prompts of a request.

    Raises:
        HttpError: the request is wrong, or cannot be answered now.
    """
    service: Service = request.app.state.service
    model = service.model
    body = await parse_body(await request.body(), service.settings.max_depth)
    model.check_name(body.get("model"))
    if body.get("suffix") not in (None, ""):
        raise HttpError(400, "suffix is not supported: a text is continued at its end only.", param="suffix")
    fields = read_fields(body, TEXT_URL, _OWN, service.settings)
    with told(body):
        echo = _echo(body, fields)
        given = _prompts(body.get("prompt"), service.settings.max_under_way)
    prompts = await service.read(lambda: [_token_ids(model, prompt) for prompt in given])
    asked: list[Asked] = []
    # A request for no new token runs for one, which is not shown: the prompt's last logits give it anyway.
    wanted = fields.sampling.get("max_new_tokens")
    for ids in prompts:
        room = model.room(ids, "prompt")
        sampling = {**fields.sampling, "max_new_tokens": max(1, min(room if wanted is None else wanted, room))}
        if echo and "logprobs" in sampling:
            sampling["prompt_logprobs"] = sampling["logprobs"]
        with told(body):
            params = model.params(**sampling)
        await service.read(partial(model.compile, params))
        asked += [Asked(ids, one, fields.priority) for one in each_seed(params, fields.num_answers)]
    echoed = [p if isinstance(p, str) else model.decode(p) for p in given] if echo else []
    form = TextForm(model.token_text, echoed, fields.num_answers, hidden=wanted == 0)
    usage = Usage(sum(map(len, prompts)), fields.num_answers, hidden_tokens=int(wanted == 0))
    id = f"cmpl-{request.state.request_id.removeprefix('req_')}"
    call = Call(request, service, service.submit(asked), form, usage, id)
    return await call.respond(stream=fields.stream, include_usage=fields.include_usage)


class TextForm:
    """Continued texts in OpenAI's form.

    Args:
        token_text: returns a token's text, for log-probabilities.
        echoed: the texts of the prompts, where answers begin with them; else empty.
        num_answers: to each prompt.
        hidden: whether new tokens are not shown.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self, token_text: Callable[[int], str], echoed: list[str], num_answers: int, *, hidden: bool = False
    ) -> None:
        self._token_text = token_text
        self._echoed = echoed
        self._num_answers = num_answers
        self._hidden = hidden

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole answer."""
        text = "" if self._hidden else completion.text
        entries = [] if completion.prompt_logprobs is None else prompt_logprobs(completion)
        begin = len(entries)
        if completion.logprobs is not None and not self._hidden:
            entries += token_logprobs(completion)
        logprobs = None
        if completion.logprobs is not None:
            logprobs = text_logprobs(entries, self._token_text)
            if begin:
                logprobs["top_logprobs"][0] = None  # nothing comes before the first token
        reason = "length" if self._hidden else completion.finish_reason
        return _choice(index, self._prompt_text(index) + text, logprobs, reason)

    def first(self, index: int) -> dict[str, Any] | None:
        """Return what is sent before the first token: the prompt, where it is echoed."""
        return _choice(index, self._prompt_text(index), None, None) if self._echoed else None

    def piece(self, index: int, output: StepOutput) -> dict[str, Any] | None:
        """Return what an output adds to an answer; None for nothing."""
        if self._hidden:
            return None if output.completion is None else _choice(index, "", None, "length")
        logprobs = None
        if output.logprobs:
            entries = [(token, *of) for token, of in zip(output.token_ids, output.logprobs, strict=True)]
            logprobs = text_logprobs(entries, self._token_text)
        reason = None if output.completion is None else output.completion.finish_reason
        if not output.text and logprobs is None and reason is None:
            return None
        return _choice(index, output.text, logprobs, reason)

    def _prompt_text(self, index: int) -> str:
        return self._echoed[index // self._num_answers] if self._echoed else ""


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _echo(body: dict[str, Any], fields: CallFields) -> bool:
    """Return whether answers begin with their prompts; check the fields that only texts have."""
    echo, best_of = body.get("echo"), body.get("best_of")
    if echo is not None and not isinstance(echo, bool):
        raise ConfigError(f"echo is {short(echo)}; it must be true or false")
    if echo and fields.stream and "logprobs" in fields.sampling:
        raise ConfigError("echo with logprobs cannot be streamed: leave out one of echo, logprobs and stream")
    if best_of is not None and (type(best_of) is not int or best_of != fields.num_answers):
        raise ConfigError(f"best_of is {short(best_of)}; it must be n: every answer is returned")
    return bool(echo)


def _prompts(prompt: Any, most: int) -> list[str | list[int]]:
    """Return the prompts of a text, token ids, or a list of these."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(one) is int for one in prompt):
            return [prompt]
        if len(prompt) > most:
            raise ConfigError(f"prompt has {len(prompt):,} prompts; this server holds {most:,} at once")
        kinds = {_kind(one) for one in prompt}
        if kinds in ({"text"}, {"ids"}):
            return prompt
    raise ConfigError(f"prompt is {short(prompt)}; it must be a text, a list of token ids, or a list of either")


def _kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    return "ids" if isinstance(prompt, list) and all(type(one) is int for one in prompt) else None


def _token_ids(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return model.encode_text(prompt)
    model.check_ids(prompt, "prompt")
    return prompt
