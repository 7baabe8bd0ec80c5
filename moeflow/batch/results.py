"""The answers of a batch: lines appended as they come, so that a killed run loses none and the next goes on."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moeflow.atomic_file import atomic_file, write_all
from moeflow.batch.openai_format import batch_record, prompt_logprobs, response_body, token_logprobs
from moeflow.errors import ConfigError, MoeflowError
from moeflow.file_lock import lock_file

if TYPE_CHECKING:
    from moeflow.batch.requests import BatchRequest, RefusedLine
    from moeflow.engine.request import Completion

_LINE_START = b'{"id": '


class BatchFile:
    """An output file that this process alone appends to.

    A last line that a kill cut off is removed. What is left says which requests are done; one that failed is done too.

    Args:
        path: the file; it is made where it does not exist.

    Raises:
        ConfigError: the file cannot be opened, is being written by another process, or holds other things than the
            answers of a batch; then it stays as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.finished: dict[str, str | None] = {}  # of each id's line, the error; None for an answer
        self.digests: dict[str, str] = {}  # of each answer, that of the request
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}. Give another output.") from error
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise ConfigError(f"{self.path} is no plain file, from which a run could go on. Give another output.")
            if not lock_file(self._descriptor, self.path):
                raise ConfigError(
                    f"{self.path} is being written by another process. Wait for it, or give another output."
                )
            self.read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def read(self) -> None:
        """Note what the file says is finished; cut off a torn line.

        An interrupt may come between the writing of a line and its noting: whoever catches one reads before counting.

        Raises:
            ConfigError: the file holds other things than the answers of a batch.
        """
        with open(self.path, "rb") as file:
            lines = file.readlines()
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        if not torn.startswith(_LINE_START) and not _LINE_START.startswith(torn):
            self._refuse(len(lines) + 1)
        for number, line in enumerate(lines, 1):
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._refuse(number)
        if torn:
            os.ftruncate(self._descriptor, sum(map(len, lines)))

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; it is in the file, whole, when this returns.

        Args:
            record: of `answer_record` or `failure_record`, with an id that is not in the file.

        Raises:
            MoeflowError: the disk refuses it; the lines before it are kept.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            write_all(self._descriptor, line)
        except OSError as error:
            with suppress(OSError):  # else the next start cuts it off
                os.ftruncate(self._descriptor, end)
            raise MoeflowError(
                f"{self.path} cannot be written: {error.strerror}. The {len(self.finished)} lines before are kept; "
                "the same command goes on from there."
            ) from error
        self._note(record)

    def forget(self, ids: Collection[str]) -> None:
        """Remove the lines of some ids, so that they can be answered anew.

        Raises:
            ConfigError: the file cannot be rewritten; it is as it was.
        """
        if not ids:
            return
        self._replace([line for line in self.path.read_bytes().splitlines(True) if _id_of(json.loads(line)) not in ids])
        for name in ids:
            self.finished.pop(name, None)
            self.digests.pop(name, None)

    def close(self) -> None:
        """Let other processes write."""
        os.close(self._descriptor)

    def __enter__(self) -> BatchFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _note(self, record: dict[str, Any]) -> None:
        name, error = _id_of(record), _error_of(record)
        if error is None:
            self.digests[name] = _digest_of(record)
        self.finished[name] = error

    def _refuse(self, number: int) -> NoReturn:
        raise ConfigError(
            f"{self.path}, line {number} is no answer of a batch. Give another output; nothing was changed."
        )

    def _replace(self, lines: list[bytes]) -> None:
        """Put a file with these lines in place of the present one."""
        with ExitStack() as opened:
            with atomic_file(self.path, ConfigError) as partial:
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
                opened.callback(os.close, descriptor)
                lock_file(descriptor, partial)  # before it has the name under which others look for it
                write_all(descriptor, b"".join(lines))
            opened.pop_all()
        os.close(self._descriptor)
        self._descriptor = descriptor


def answer_record(request: BatchRequest, completion: Completion, decode: Callable[[int], str]) -> dict[str, Any]:
    """Return the line of a request that was answered, in the form the request has.

    Args:
        request: the `BatchRequest`.
        completion: the engine's `Completion`, finished by "stop" or "length".
        decode: a token id's text, for the log-probabilities of OpenAI's form.
    """
    if request.url is None:
        record: dict[str, Any] = {
            "id": request.id,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(completion.prompt_ids),
            "completion_tokens": len(completion.token_ids),
            "request": request.digest,
        }
        if completion.logprobs is not None:
            record["logprobs"] = [
                {"token_id": token_id, "logprob": logprob, "top": top}
                for token_id, logprob, top in token_logprobs(completion)
            ]
        if completion.prompt_logprobs is not None:
            record["prompt_logprobs"] = [
                {"token_id": token_id, "logprob": logprob, "top": top}
                for token_id, logprob, top in prompt_logprobs(completion)
            ]
        return record
    body = response_body(
        completion,
        id=f"cmpl-{request.number}",
        model=request.model,
        in_chat=isinstance(request.content, list),
        decode=decode,
    )
    response = {"status_code": 200, "request_id": f"req_{request.digest}", "body": body}
    return batch_record(request.number, request.id, response=response)


def failure_record(request: BatchRequest | RefusedLine, error: str) -> dict[str, Any]:
    """Return the line of a request that failed, or of a line that was refused.

    Args:
        request: the `BatchRequest` or `RefusedLine`.
        error: why.
    """
    if request.url is None:
        return {"id": request.id, "line": request.number, "error": error}
    failure = {"code": "failed", "message": error, "line": request.number}
    return batch_record(request.number, request.id, error=failure)


def _id_of(record: dict[str, Any]) -> str:
    name = record["custom_id"] if "custom_id" in record else record["id"]
    if not isinstance(name, str):
        raise TypeError("an id is a text")
    return name


def _error_of(record: dict[str, Any]) -> str | None:
    """Return why a line's request failed; None for an answer. KeyError where the line is neither."""
    if "custom_id" in record:
        error = record["error"]
        return error and error["message"]
    if "error" in record:
        return record["error"]
    record["finish_reason"]
    return None


def _digest_of(record: dict[str, Any]) -> str:
    """Return the digest of the request that a line answers; KeyError where it tells none."""
    return record["response"]["request_id"].removeprefix("req_") if "custom_id" in record else record["request"]
