"""POST /v1/responses, /v1/messages and /v1/messages/count_tokens: one answer in another form.

Knows turns of a conversation and forms. Knows nothing of fields.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from moeflow.server.endpoints.chat import Turn, read_turn
from moeflow.server.endpoints.fields import told
from moeflow.server.reading.answer_reader import Part, Reasoning
from moeflow.server.translations import messages_request, responses_request
from moeflow.server.translations.form import Form
from moeflow.server.translations.messages_form import MessagesForm
from moeflow.server.translations.responses_form import ResponsesForm
from moeflow.server.wire.body import parse_body
from moeflow.server.wire.errors import HttpError, JsonResponse
from moeflow.server.wire.event_stream import EventStream, while_connected

if TYPE_CHECKING:
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.server.answers import Answers
    from moeflow.server.service import Service

_PING = b": alive\n\n"


async def create_response(request: Request) -> Response:
    """Answer a request of OpenAI's newer form.

    Raises:
        HttpError: the request is wrong, or cannot be answered now.
    """
    service: Service = request.app.state.service
    body = await parse_body(await request.body(), service.settings.max_depth)
    if body.get("previous_response_id") or body.get("conversation"):
        raise HttpError(
            400,
            "previous_response_id and conversation are not supported: nothing is stored here. Send the whole "
            "conversation as input; what is kept of it is not computed again.",
            param="previous_response_id" if body.get("previous_response_id") else "conversation",
        )
    with told(body):
        chat = responses_request.chat_body(body)
    turn = await read_turn(service, chat, names_of=body)
    id = f"resp_{request.state.request_id.removeprefix('req_')}"
    return await _answer(request, turn, ResponsesForm(id, service.model.name, body))


async def create_message(request: Request) -> Response:
    """Answer a request of Anthropic's form.

    Raises:
        HttpError: the request is wrong, or cannot be answered now.
    """
    service: Service = request.app.state.service
    turn = await _message_turn(request)
    id = f"msg_{request.state.request_id.removeprefix('req_')}"
    return await _answer(request, turn, MessagesForm(id, service.model.name))


async def count_message_tokens(request: Request) -> Response:
    """Count the tokens of a request of Anthropic's form.

    Raises:
        HttpError: the request is wrong.
    """
    turn = await _message_turn(request, max_tokens=1)
    return JsonResponse({"input_tokens": turn.usage.prompt_tokens})


async def _message_turn(request: Request, **defaults: int) -> Turn:
    service: Service = request.app.state.service
    body = {**defaults, **await parse_body(await request.body(), service.settings.max_depth)}
    with told(body):
        chat = messages_request.chat_body(body)
    return await read_turn(service, chat, names_of=body)


async def _answer(request: Request, turn: Turn, form: Form) -> Response:
    service: Service = request.app.state.service
    answers = service.submit(turn.asked)
    if turn.fields.stream:
        events = _events(turn, answers, form, service.settings.ping_s, request.state.request_id)
        return EventStream(events, answers.close)
    try:
        parts, completion = await while_connected(request.receive, _whole(turn, answers))
        return JsonResponse(form.whole(parts, completion, turn.usage))
    finally:
        answers.close()


async def _whole(turn: Turn, answers: Answers) -> tuple[list[Part], Completion]:
    parts: list[Part] = []
    async for output, found in _read(turn, answers, None):
        parts += found
        if output is not None and output.completion is not None:
            return parts, output.completion
    raise AssertionError("an answer ended without its completion")


async def _events(turn: Turn, answers: Answers, form: Form, ping_s: float, request_id: str) -> AsyncIterator[bytes]:
    begun = False
    try:
        async for output, parts in _read(turn, answers, ping_s):
            if not begun:
                for event in form.begin(turn.usage):
                    yield event
                begun = True
            if output is None:
                yield _PING
                continue
            for part in parts:
                for event in form.part(part):
                    yield event
            if output.completion is not None:
                for event in form.end(output.completion, turn.usage):
                    yield event
    except HttpError as error:
        for event in form.failed(error, request_id):
            yield event


async def _read(
    turn: Turn, answers: Answers, ping_s: float | None
) -> AsyncIterator[tuple[StepOutput | None, list[Part]]]:
    """Yield the outputs of the one answer with what they say; None for a while without any."""
    reader = turn.reader()
    async for outputs in answers.outputs(ping_s):
        if not outputs:
            yield None, []
        for _, output in outputs:
            parts = reader.push(output.text)
            if output.completion is not None:
                parts += reader.finish()
                turn.usage.add(0, output.completion)
            if parts and all(isinstance(part, Reasoning) for part in parts):
                turn.usage.reasoning_tokens += len(output.token_ids)
            yield output, parts
