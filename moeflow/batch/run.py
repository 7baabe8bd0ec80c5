"""A batch: the engine answers requests, and each answer is in the file as soon as it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeflow.batch.requests import BatchRequest
from moeflow.batch.results import BatchFile, answer_record, failure_record
from moeflow.errors import MoeflowError
from moeflow.hf.encoding import encode_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moeflow.engine.engine import Engine
    from moeflow.engine.request import Completion


def answer_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[BatchRequest],
    file: BatchFile,
    *,
    num_ahead: int,
    on_step: Callable[[dict[str, int], list[str]], None],
) -> None:
    """Answer requests in whatever order they end; one that fails is written with its error and the others go on.

    Args:
        engine: with nothing else to do.
        tokenizer: the model's.
        requests: those whose ids are not in the file.
        file: where the answers go.
        num_ahead: most requests that the engine holds at once, running or waiting.
        on_step: called after each step with the number of new tokens of each id that got some, and the ids that ended.

    Raises:
        MoeflowError: the file cannot be written, or the engine cannot go on; what is in the file is kept.
    """
    from moeflow.hf.passes.forward import context_positions

    context = context_positions(engine.model)
    coming = iter(requests)
    held: dict[str, BatchRequest] = {}
    while True:
        refused = []
        while len(held) < num_ahead and (request := next(coming, None)) is not None:
            try:
                engine.add(_prompt(tokenizer, request.content, context), request.params, id=request.id)
            except MoeflowError as error:
                file.append(failure_record(request, str(error)))
                refused.append(request.id)
            else:
                held[request.id] = request
        if refused:
            on_step({}, refused)
        if not held:
            return
        num_new, ended = {}, []
        for output in engine.step():
            num_new[output.id] = len(output.token_ids)
            if output.completion is not None:
                file.append(_record(held.pop(output.id), output.completion, tokenizer))
                ended.append(output.id)
        on_step(num_new, ended)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]], context: int | None
) -> str | list[int]:
    """Return a prompt as it is, or the tokens of messages as the chat template writes them."""
    if isinstance(content, str):
        return content
    return encode_messages(tokenizer, content, context)


def _record(request: BatchRequest, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if completion.finish_reason in ("error", "cancelled"):
        return failure_record(request, completion.error or completion.finish_reason)
    return answer_record(request, completion, lambda token_id: str(tokenizer.decode([token_id])))
