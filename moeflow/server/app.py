"""The application: which path is answered by what, behind the guard.

Knows endpoints, the guard and the service. Knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from moeflow.batch.openai_format import CHAT_URL, TEXT_URL
from moeflow.server.endpoints import about, tokens
from moeflow.server.endpoints.chat import create_chat_completion
from moeflow.server.endpoints.completions import create_completion
from moeflow.server.page.endpoint import show_page
from moeflow.server.service import Service
from moeflow.server.settings import ServerSettings
from moeflow.server.translations import endpoint as foreign
from moeflow.server.translations.messages_form import error_body
from moeflow.server.wire.errors import HttpError, JsonResponse
from moeflow.server.wire.guard import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_ANTHROPIC = "/v1/messages"  # paths that begin so are of this form, errors included
_ROUTES = (
    ("GET", "/", show_page),
    ("POST", CHAT_URL, create_chat_completion),
    ("POST", TEXT_URL, create_completion),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("POST", "/v1/responses", foreign.create_response),
    ("POST", _ANTHROPIC, foreign.create_message),
    ("POST", f"{_ANTHROPIC}/count_tokens", foreign.count_message_tokens),
    ("GET", "/v1/models", about.list_models),
    ("GET", "/v1/models/{name:path}", about.show_model),
    ("GET", "/health", about.health),
    ("GET", "/stats", about.stats),
    ("GET", "/metrics", about.metrics),
)


def create_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: ServerSettings | None = None,
) -> FastAPI:
    """Return an application that answers OpenAI's clients with a model; any ASGI server runs it.

    Its shutdown ends what is under way and closes the engine; the model stays the caller's. `app.state.service.close()`
    does the same where no server calls the application's shutdown, as when it is mounted in another.

    Args:
        model: of `load_moe`, or any transformers causal LM that `Engine` takes.
        tokenizer: the model's, or its processor with a tokenizer in it, by which messages may show images.
        settings: the server's; None for the defaults, which let only this machine's names in.

    Raises:
        ConfigError: a setting does not fit the model.
        UnsupportedModelError: `Engine` does not take the model.
    """
    service = Service(settings or ServerSettings())
    try:
        inner = getattr(tokenizer, "tokenizer", None)  # of a processor
        if inner is None:
            service.open(model, cast("PreTrainedTokenizerBase", tokenizer))
        else:
            service.open(model, inner, tokenizer)
    except BaseException:
        service.close()
        raise
    return build_app(service)


def build_app(service: Service) -> FastAPI:
    """Return the application of a service whose model may come later."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    settings = service.settings
    routes: list[BaseRoute] = [Route(path, endpoint, methods=[method]) for method, path, endpoint in _ROUTES]
    app = FastAPI(title="moeflow", lifespan=lifespan, routes=routes, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(Guard, settings=settings, unavailable=service.unavailable, respond=_respond)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Raise what the router refuses as an error of ours, which the guard tells."""
    assert isinstance(error, HTTPException), "registered for it"
    path = request.url.path[:100]
    told = {404: f"there is no {path!r} here.", 405: f"{path!r} does not take {request.method}."}
    message = told.get(error.status_code, str(error.detail))
    raise HttpError(error.status_code, message, headers=dict(error.headers or {}))


def _respond(error: HttpError, path: str, request_id: str) -> Response:
    """Return an error in the form that the clients of a path read."""
    if path.startswith(_ANTHROPIC):
        return JsonResponse(error_body(error, request_id), error.status, error.headers)
    return error.response(request_id)
