"""POST /tokenize and /detokenize: texts and messages as token ids, and back.

Knows the served model's tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError
from moeflow.server.endpoints.fields import told
from moeflow.server.reading.conversation import read_conversation
from moeflow.server.wire.body import parse_body
from moeflow.server.wire.errors import JsonResponse

if TYPE_CHECKING:
    from moeflow.server.service import Service

_MAX_LETTERS = 1_000_000  # of a text, which takes a second or two


async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of messages as the chat template writes them."""
    service, body = await _read(request)
    model = service.model
    with told(body):
        refuse_unknown(body, ("model", "prompt", "messages", "add_special_tokens"), "the request")
        prompt, messages = body.get("prompt"), body.get("messages")
        special = body.get("add_special_tokens", True)
        if not isinstance(special, bool):
            raise ConfigError(f"add_special_tokens is {short(special)}; it must be true or false")
        if (prompt is None) == (messages is None):
            raise ConfigError("the request must have a prompt or messages, one of them")
        if messages is not None:
            read = read_conversation(messages, model.image_parts())
            ids = (await service.read(lambda: model.encode_messages(read, cut=False))).token_ids
        elif isinstance(prompt, str) and len(prompt) <= _MAX_LETTERS:
            ids = await service.read(lambda: model.encode_text(prompt, special_tokens=special, cut=False))
        else:
            raise ConfigError(f"prompt is {short(prompt)}; it must be a text of at most {_MAX_LETTERS:,} letters")
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})


async def detokenize(request: Request) -> Response:
    """Return the text of token ids, special tokens written."""
    service, body = await _read(request)
    with told(body):
        refuse_unknown(body, ("model", "tokens"), "the request")
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise ConfigError(f"tokens is {short(tokens)}; it must be a list of token ids")
    service.model.check_ids(tokens, "tokens")
    return JsonResponse({"prompt": await service.read(lambda: service.model.decode(tokens))})


async def _read(request: Request) -> tuple[Service, dict[str, Any]]:
    service: Service = request.app.state.service
    body = await parse_body(await request.body(), service.settings.max_depth)
    service.model.check_name(body.get("model"))
    return service, body
