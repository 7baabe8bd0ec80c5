"""Settings of a server, checked once.

Knows what is allowed. Imports neither torch nor FastAPI, so that the command line can.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from moeflow.errors import ConfigError
from moeflow.memory_size import MemorySize

_AT_LEAST_1 = (
    "max_batch_size", "max_body_bytes", "max_depth", "max_connections", "max_answers", "max_stop_strings",
    "max_top_logprobs", "max_unread", "max_images", "max_image_bytes", "max_image_pixels",
    "max_images_memory",
)  # fmt: skip
_STEP_TOKENS = 512  # computed in one pass, where nothing else is said
_SECONDS = ("grace_s", "body_timeout_s", "header_timeout_s", "send_timeout_s", "ping_s")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers, and what it refuses.

    Args:
        model_name: what /v1/models calls the model; None for the name in its config.
        host: the address that the server is bound to.
        api_key: what requests must bring, as `Authorization: Bearer KEY` or `x-api-key: KEY`; None for none.
        insecure: whether other machines may reach a server without a key.
        allowed_hosts: names in `Host` headers that are taken beside addresses, `localhost` and `host`.
        cors_origins: origins whose pages may call the server, as in "https://example.org"; "*" for all.
        max_batch_size: most sequences that run at once.
        max_step_tokens: most tokens computed in one pass, at least max_batch_size: prompts are cut to fit beside the
            tokens of sequences that decode. None for 512, or max_batch_size where that is more.
        kv_memory: bytes of keys and values, as of `Engine`.
        kv_disk: folder in which kept keys and values outlast the server; None for none.
        kept_folder: folder to which they go before they leave kv_memory, as of `Engine`; None for none.
        kept_disk: most bytes there.
        context: most positions of a prompt and its answer; None for the model's.
        max_waiting: most requests that wait for their turn; beyond them a request is answered 429.
        grace_s: seconds in which running answers may finish when the server stops.
        log_prompts: whether bodies of requests are logged.
        max_answers: most answers to one prompt (`n`).
        max_stop_strings: most stop strings of a request.
        max_top_logprobs: most likeliest tokens that are reported with each.
        max_images: most images of a request.
        max_image_bytes: most bytes of an image's file.
        max_image_pixels: most pixels of all images of a request together.
        max_images_memory: most bytes of the images of all requests under way, as the model takes them; those of one
            request may be more.
        max_body_bytes: most bytes of a body.
        max_depth: most levels of objects and lists in a body.
        max_connections: most connections that are held at once; others are closed.
        max_unread: most outputs of a stream that wait for a client that does not read; then it is cancelled.
        body_timeout_s: seconds in which a body must have come.
        header_timeout_s: seconds in which a request's headers must have come.
        send_timeout_s: seconds after which a client that takes nothing is cut off.
        ping_s: seconds without an event after which a stream says that it is alive.

    Raises:
        ConfigError: a value is not allowed, or other machines could reach the server without a key.
    """

    model_name: str | None = None
    host: str = "127.0.0.1"
    api_key: str | None = None
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_batch_size: int = 32
    max_step_tokens: int | None = None
    kv_memory: MemorySize = "auto"
    kv_disk: str | None = None
    kept_folder: str | None = None
    kept_disk: MemorySize = "4GiB"
    context: int | None = None
    max_waiting: int = 256
    grace_s: float = 10.0
    log_prompts: bool = False
    max_answers: int = 16
    max_stop_strings: int = 16
    max_top_logprobs: int = 20
    max_images: int = 16
    max_image_bytes: int = 20 << 20
    max_image_pixels: int = 1 << 26
    max_images_memory: int = 1 << 30
    max_body_bytes: int = 32 << 20
    max_depth: int = 64
    max_connections: int = 512
    max_unread: int = 4096
    body_timeout_s: float = 30.0
    header_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    ping_s: float = 15.0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_1:
            self._check(name, lambda value: type(value) is int and value >= 1, "a whole number, at least 1")
        self._check("max_waiting", lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")
        self._check(
            "context", lambda value: value is None or (type(value) is int and value >= 2), "a whole number, at least 2"
        )
        self._check(
            "max_step_tokens",
            lambda value: value is None or (type(value) is int and value >= self.max_batch_size),
            f"a whole number, at least max_batch_size ({self.max_batch_size})",
        )
        for name in _SECONDS:
            self._check(name, lambda value: type(value) in (int, float) and 0 <= value < 1e9, "seconds, 0 or more")
        for name in ("allowed_hosts", "cors_origins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.api_key is not None and (
            not isinstance(self.api_key, str) or not self.api_key.isascii() or not self.api_key.strip()
        ):
            raise ConfigError("the API key is empty or has letters beyond ASCII: give another.")
        if not is_loopback(self.host) and self.api_key is None and not self.insecure:
            raise ConfigError(
                f"host {self.host} lets other machines reach this server, and there is no key. Give --api-key (or "
                "MOEFLOW_API_KEY), or --insecure if everyone may use it."
            )

    @property
    def step_tokens(self) -> int:
        """Most tokens computed in one pass."""
        return self.max_step_tokens or max(_STEP_TOKENS, self.max_batch_size)

    @property
    def max_under_way(self) -> int:
        """Most requests that run or wait."""
        return self.max_batch_size + self.max_waiting

    def _check(self, name: str, holds: Any, allowed: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ConfigError(f"{name} is {value!r}; it must be {allowed}")
