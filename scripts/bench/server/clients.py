"""Clients of a server: streamed answers, and when their tokens came.

Knows OpenAI's forms. Knows nothing of which server answers.
"""

import asyncio
import json
import time
from typing import NamedTuple

import httpx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Answer(NamedTuple):
    """How an answer came.

    Args:
        due_s: when it was asked for, or was to be, in seconds of `time.perf_counter`.
        first_s: when the first text came.
        last_s: when the last text came.
        num_tokens: of it.
        text: of it.
    """

    due_s: float
    first_s: float
    last_s: float
    num_tokens: int
    text: str

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds from token to token; 0 for a single one."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


def ask(url: str, path: str, body: dict) -> Answer:
    """Return one answer, asked for alone."""
    return ask_all(url, path, [body])[0]


def ask_all(url: str, path: str, bodies: list[dict], at_s: list[float] | None = None) -> list[Answer]:
    """Return all answers.

    Args:
        url: of the server.
        path: of the endpoint.
        bodies: of the requests, "max_tokens" in each; an answer without usage is taken to have as many.
        at_s: when each is sent, in seconds from now; None for all at once.
    """

    async def run() -> list[Answer]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
            begin_s = time.perf_counter()
            due = [begin_s + after for after in at_s or [0.0] * len(bodies)]
            return await asyncio.gather(*(_ask(client, path, body, at) for body, at in zip(bodies, due, strict=True)))

    return asyncio.run(run())


async def _ask(client: httpx.AsyncClient, path: str, body: dict, due_s: float) -> Answer:
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    pieces: list[str] = []
    num_tokens, first_s, last_s = body["max_tokens"], None, due_s
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise OSError(f"{path} answered {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise OSError(f"{path}: {chunk['error']['message']}")
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                piece = choice.get("text") or choice.get("delta", {}).get("content")
                if piece:
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    pieces.append(piece)
    return Answer(due_s, first_s or last_s, last_s, num_tokens, "".join(pieces))
