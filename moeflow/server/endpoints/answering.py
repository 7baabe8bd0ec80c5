"""One call answered: whole, or as a stream of chunks; in the form of its endpoint.

Knows answers and event streams. Knows nothing of prompts or sampling.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from moeflow.server.wire.errors import HttpError, JsonResponse
from moeflow.server.wire.event_stream import DONE, PING, EventStream, event, while_connected

if TYPE_CHECKING:
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.server.answers import Answers
    from moeflow.server.service import Service


class Form(Protocol):
    """How an endpoint writes its answers.

    Attributes:
        whole_object, chunk_object: OpenAI's names of the two kinds of responses.
    """

    whole_object: str
    chunk_object: str

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole answer, whose outputs were given to `piece` before."""

    def first(self, index: int) -> dict[str, Any] | None:
        """Return what is sent before the first token of an answer; None for nothing."""

    def piece(self, index: int, output: StepOutput) -> dict[str, Any] | None:
        """Return what an output adds to an answer; None for nothing."""


@dataclass
class Usage:
    """Tokens of a call.

    Args:
        prompt_tokens: of all prompts, each counted once.
        num_answers: to each prompt.
        hidden_tokens: tokens of each answer that are not shown.
    """

    prompt_tokens: int
    num_answers: int = 1
    hidden_tokens: int = 0
    completion_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)
    reasoning_tokens: int = field(default=0, init=False)

    def add(self, index: int, completion: Completion) -> None:
        """Count an answer."""
        self.completion_tokens += len(completion.token_ids) - self.hidden_tokens
        if index % self.num_answers == 0:
            self.cached_tokens += completion.cached_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass
class Call:
    """A call under way.

    Args:
        request: whose.
        service: what answers.
        answers: to it.
        form: of its endpoint.
        usage: counts its tokens.
        id: of the response.
    """

    request: Request
    service: Service
    answers: Answers
    form: Form
    usage: Usage
    id: str

    async def respond(self, *, stream: bool, include_usage: bool) -> Response:
        """Return the response, whole or as a stream."""
        if stream:
            return EventStream(self._chunks(include_usage), self.answers.close)
        try:
            return JsonResponse(await while_connected(self.request.receive, self._whole()))
        finally:
            self.answers.close()

    async def _whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async for outputs in self.answers.outputs():
            for index, output in outputs:
                self.form.piece(index, output)
                if output.completion is not None:
                    choices[index] = self.form.choice(index, output.completion)
                    self.usage.add(index, output.completion)
        response = self._response(self.form.whole_object, [choices[index] for index in sorted(choices)])
        return {**response, "usage": self.usage.as_dict()}

    async def _chunks(self, include_usage: bool) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        name, usage = self.form.chunk_object, {"usage": None} if include_usage else {}
        chunk = {**self._response(name, []), **usage}
        try:
            async for outputs in self.answers.outputs(self.service.settings.ping_s):
                if not outputs:
                    yield PING
                for index, output in outputs:
                    first = None if index in begun else self.form.first(index)
                    begun.add(index)
                    if output.completion is not None:
                        self.usage.add(index, output.completion)
                    for choice in (first, self.form.piece(index, output)):
                        if choice is not None:
                            yield event({**chunk, "choices": [choice]})
        except HttpError as error:  # without [DONE]: the answer is not whole
            yield event(error.body(self.request.state.request_id))
            return
        if include_usage:
            yield event({**chunk, "usage": self.usage.as_dict()})
        yield DONE

    def _response(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": int(time.time()),
            "model": self.service.model.name,
            "choices": choices,
        }
