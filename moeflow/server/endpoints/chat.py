"""POST /v1/chat/completions: answers to messages.

Knows messages, tools and OpenAI's form of an answer. Knows nothing of HTTP beneath bodies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response

from moeflow.batch.openai_format import CHAT_URL, chat_logprobs, token_logprobs
from moeflow.engine.sampling_params import STRUCTURES
from moeflow.errors import ConfigError
from moeflow.server.endpoints.answering import Call, Usage
from moeflow.server.endpoints.fields import CallFields, each_seed, read_fields, told
from moeflow.server.reading.answer_reader import Part, Reasoning, Text, ToolCall
from moeflow.server.reading.conversation import read_conversation
from moeflow.server.reading.forced_calls import ForcedCallsReader
from moeflow.server.reading.tools import FIELDS, read_tools
from moeflow.server.wire.body import parse_body
from moeflow.server.worker import Asked

if TYPE_CHECKING:
    from moeflow.engine.request import Completion, StepOutput
    from moeflow.server.service import Service

_OWN = ("messages", *FIELDS)


class Reader(Protocol):
    """Reads one answer: `AnswerReader`, or calls that a grammar has forced."""

    def push(self, text: str) -> list[Part]:
        """Take the next piece of the answer and return what is certain now."""

    def finish(self) -> list[Part]:
        """Return the rest."""


class Turn(NamedTuple):
    """What a request about a conversation asks.

    Args:
        fields: of its body.
        asked: of the engine, one for each answer.
        usage: its tokens.
        reader: makes what reads one answer.
    """

    fields: CallFields
    asked: list[Asked]
    usage: Usage
    reader: Callable[[], Reader]


async def create_chat_completion(request: Request) -> Response:
    """Answer the messages of a request.

    Raises:
        HttpError: the request is wrong, or cannot be answered now.
    """
    service: Service = request.app.state.service
    body = await parse_body(await request.body(), service.settings.max_depth)
    turn = await read_turn(service, body)
    id = f"chatcmpl-{request.state.request_id.removeprefix('req_')}"
    form = ChatForm(service.model.token_text, turn.reader, id, turn.usage)
    call = Call(request, service, service.submit(turn.asked), form, turn.usage, id)
    return await call.respond(stream=turn.fields.stream, include_usage=turn.fields.include_usage)


async def read_turn(service: Service, body: dict[str, Any], *, names_of: dict[str, Any] | None = None) -> Turn:
    """Read a body of /v1/chat/completions.

    Args:
        service: what will answer.
        body: the request's, or translated into its form.
        names_of: the body whose fields errors name; the same where it is not translated.

    Raises:
        HttpError: the request is wrong.
    """
    settings, model = service.settings, service.model
    model.check_name(body.get("model"))
    fields = read_fields(body, CHAT_URL, _OWN, settings)
    sampling = dict(fields.sampling)
    with told(names_of or body):
        tools = read_tools(body)
        messages = read_conversation(body.get("messages"), model.image_parts())
        bound = next((name for name in STRUCTURES if name in sampling), None)
        if tools.schema is not None:
            if bound is not None:
                raise ConfigError(f"tool_choice demands a call, and {bound} binds the answer; leave out one of them")
            sampling["json_schema"] = tools.schema
    ids, images = await service.read(lambda: model.encode_messages(messages, tools.offered))
    room = model.room(ids, "messages")
    marks = model.marks(calls=bool(tools.offered))
    with told(names_of or body):
        wanted = sampling.get("max_new_tokens", room)
        if wanted < 1:
            raise ConfigError("max_tokens is 0; an answer to messages has at least 1")
        sampling["max_new_tokens"] = min(wanted, room)
        if marks.are_special and not bound and tools.schema is None:
            sampling["skip_special_tokens"] = False
        params = model.params(**sampling)
    await service.read(lambda: model.compile(params))
    asked = [Asked(ids, one, fields.priority, images) for one in each_seed(params, fields.num_answers)]

    def reader() -> Reader:
        if tools.schema is not None:
            return ForcedCallsReader()
        return model.reader(marks if bound is None else None, ids, tools)

    return Turn(fields, asked, Usage(len(ids), fields.num_answers), reader)


class ChatForm:
    """Answers to messages in OpenAI's form.

    Args:
        token_text: returns a token's text, for log-probabilities.
        reader: makes what reads one answer.
        id: of the response; calls are named after it.
        usage: counts tokens of reasoning.
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, token_text: Callable[[int], str], reader: Callable[[], Reader], id: str, usage: Usage) -> None:
        self._token_text = token_text
        self._readers: defaultdict[int, Reader] = defaultdict(reader)
        self._id = id.removeprefix("chatcmpl-")
        self._usage = usage
        self._said: defaultdict[int, dict[str, Any]] = defaultdict(dict)  # by each answer, all of it

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole answer, whose outputs `piece` has seen."""
        logprobs = None
        if completion.logprobs is not None:
            logprobs = chat_logprobs(token_logprobs(completion), self._token_text)
        said = dict(self._said[index])
        if "tool_calls" in said:
            said["tool_calls"] = [{name: call[name] for name in call if name != "index"} for call in said["tool_calls"]]
        content = said.pop("content", None if "tool_calls" in said else "")
        message = {"role": "assistant", "content": content, "refusal": None, **said}
        reason = self._reason(index, completion)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any]:
        """Return what is sent before the first token: the role."""
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, output: StepOutput) -> dict[str, Any] | None:
        """Return what an output adds to an answer; None for nothing."""
        logprobs = None
        if output.logprobs:
            entries = [(token, *of) for token, of in zip(output.token_ids, output.logprobs, strict=True)]
            logprobs = chat_logprobs(entries, self._token_text)
        reader, completion = self._readers[index], output.completion
        parts = reader.push(output.text)
        if completion is not None:
            parts += reader.finish()
        if parts and all(isinstance(part, Reasoning) for part in parts):
            self._usage.reasoning_tokens += len(output.token_ids)
        said = self._delta_of(index, parts)
        reason = None if completion is None else self._reason(index, completion)
        if not said and logprobs is None and reason is None:
            return None
        return _delta(index, said, logprobs, reason)

    def _delta_of(self, index: int, parts: list[Part]) -> dict[str, Any]:
        """Return parts as a delta, and keep them."""
        delta: dict[str, Any] = {}
        whole = self._said[index]
        for part in parts:
            if isinstance(part, ToolCall):
                calls = whole.setdefault("tool_calls", [])
                id = f"call_{self._id}_{index}_{len(calls)}"
                function = {"name": part.name, "arguments": part.arguments}
                calls.append({"index": len(calls), "id": id, "type": "function", "function": function})
                delta.setdefault("tool_calls", []).append(calls[-1])
            else:
                name = "content" if isinstance(part, Text) else "reasoning_content"
                for said in (delta, whole):
                    said[name] = said.get(name, "") + part.text
        return delta

    def _reason(self, index: int, completion: Completion) -> str:
        return "tool_calls" if "tool_calls" in self._said[index] else completion.finish_reason


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
