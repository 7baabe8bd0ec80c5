"""POST /v1/chat/completions: answers to messages.

Knows messages and OpenAI's form of an answer to them. Knows nothing of HTTP beneath bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from moeflow.batch.messages import read_messages
from moeflow.batch.openai_format import CHAT_URL, chat_logprobs, token_logprobs
from moeflow.errors import ConfigError
from moeflow.server.endpoints.answering import Call, Usage
from moeflow.server.endpoints.fields import each_seed, known_roles, read_fields, told
from moeflow.server.wire.body import parse_body
from moeflow.server.worker import Asked

if TYPE_CHECKING:
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.server.service import Service

_OWN = ("messages",)


async def create_chat_completion(request: Request) -> Response:
    """Answer the messages of a request.

    Raises:
        HttpError: the request is wrong, or cannot be answered now.
    """
    service: Service = request.app.state.service
    settings, model = service.settings, service.model
    body = await parse_body(await request.body(), settings.max_depth)
    model.check_name(body.get("model"))
    fields = read_fields(body, CHAT_URL, _OWN, settings)
    with told(body):
        messages = read_messages(known_roles(body.get("messages")))
    ids = await service.read(lambda: model.encode_messages(messages))
    room = model.room(ids, "messages")
    with told(body):
        wanted = fields.sampling.get("max_new_tokens", room)
        if wanted < 1:
            raise ConfigError("max_tokens is 0; an answer to messages has at least 1")
        params = model.params(**{**fields.sampling, "max_new_tokens": min(wanted, room)})
    asked = [Asked(ids, one, fields.priority) for one in each_seed(params, fields.num_answers)]
    usage = Usage(len(ids), fields.num_answers)
    id = f"chatcmpl-{request.state.request_id.removeprefix('req_')}"
    call = Call(request, service, service.submit(asked), ChatForm(model.token_text), usage, id)
    return await call.respond(stream=fields.stream, include_usage=fields.include_usage)


class ChatForm:
    """Answers to messages in OpenAI's form.

    Args:
        token_text: returns a token's text, for log-probabilities.
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, token_text: Callable[[int], str]) -> None:
        self._token_text = token_text

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole answer."""
        logprobs = None
        if completion.logprobs is not None:
            logprobs = chat_logprobs(token_logprobs(completion), self._token_text)
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}

    def first(self, index: int) -> dict[str, Any]:
        """Return what is sent before the first token: the role."""
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, output: StepOutput) -> dict[str, Any] | None:
        """Return what an output adds to an answer; None for nothing."""
        logprobs = None
        if output.logprobs:
            entries = [(token, *of) for token, of in zip(output.token_ids, output.logprobs, strict=True)]
            logprobs = chat_logprobs(entries, self._token_text)
        reason = None if output.completion is None else output.completion.finish_reason
        if not output.text and logprobs is None and reason is None:
            return None
        return _delta(index, {"content": output.text} if output.text else {}, logprobs, reason)


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
