"""`moeflow serve`: an OpenAI-compatible server on one model.

The port is bound first, and answers how far loading is; Ctrl-C and SIGTERM let running answers finish.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from moeflow.cli.chat import ensure_demo_model
from moeflow.cli.model_argument import add_model_argument
from moeflow.cli.options import add_kept_options, add_loading_options, kept_options, load_model, prepare_step
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from moeflow.server.service import Service
    from moeflow.server.settings import ServerSettings

_KEY = "MOEFLOW_API_KEY"
_CHECK_S = 0.5  # how long a signal goes unseen that came just before the main thread began to sleep
_MANY: dict[str, Any] = {"action": "append", "default": []}
_FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--host", "address to listen on; one that other machines reach wants a key (127.0.0.1)", {"default": "127.0.0.1"}),
    ("--port", "port to listen on; 0 for a free one (8080)", {"type": int, "default": 8080, "metavar": "N"}),
    ("--api-key", f"key that requests must bring; {_KEY} keeps it out of the list of processes", {"metavar": "KEY"}),
    ("--insecure", "let other machines in without a key", {"action": "store_true"}),
    ("--allowed-host", "name that this server is reached by; may be repeated", {**_MANY, "metavar": "NAME"}),
    ("--cors-origin", "site whose pages may call this server; may be repeated", {**_MANY, "metavar": "ORIGIN"}),
    ("--max-batch-size", "most sequences computed at once (32)", {"type": int, "default": 32, "metavar": "N"}),
    ("--max-step-tokens", "most tokens computed in one pass (512)", {"type": int, "metavar": "N"}),
    ("--kv-memory", 'keys and values: bytes, "2GiB" or "auto"', {"default": "auto", "metavar": "SIZE"}),
    ("--kv-disk", "folder in which conversations outlast the server", {"metavar": "FOLDER"}),
    ("--context", "most tokens of a prompt and its answer; without it the model's", {"type": int, "metavar": "N"}),
    ("--max-waiting", "most requests that wait; beyond them 429 (256)", {"type": int, "default": 256, "metavar": "N"}),
    ("--grace", "seconds in which running answers may finish (10)", {"type": float, "default": 10.0, "metavar": "S"}),
    ("--log-prompts", "log the bodies of requests, prompts included", {"action": "store_true"}),
    ("--yes", "build the demo model without asking", {"action": "store_true"}),
)
EXAMPLES = """\
with the server on its default port:
  curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Name three rivers."}]}'
  OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none python my_script.py
docs/server.md lists endpoints and fields."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C, but asked for by a program."""


def add_serve_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's commands."""
    serve = commands.add_parser(
        "serve",
        help="answer OpenAI's clients over HTTP",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(serve, "; without it the demo model, built on first use", optional=True)
    for flag, text, options in _FLAGS:
        serve.add_argument(flag, help=text, **options)
    add_kept_options(serve)
    add_loading_options(serve, as_json=False)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from moeflow.memory_size import parse_memory
    from moeflow.server.wire.http_server import bind

    if not 0 <= arguments.port <= 65_535:
        raise ConfigError(f"--port is {arguments.port}; it must be 0 to 65535.")
    if arguments.kv_memory.endswith("%"):
        raise ConfigError(f'--kv-memory {arguments.kv_memory} is a share of nothing: give bytes, "2GiB" or "auto".')
    if arguments.kv_memory != "auto":
        parse_memory(arguments.kv_memory, name="--kv-memory", whole_bytes=0)
    source = ensure_demo_model(arguments.yes) if arguments.model is None else arguments.model
    settings = _settings(arguments, str(source))
    bound = bind(arguments.host, arguments.port)
    with _logging_to_stderr(), _Signals() as signals:
        try:
            _run(arguments, str(source), settings, bound, signals)
        except _Terminated:
            return 0
    return 0


def _settings(arguments: argparse.Namespace, source: str) -> "ServerSettings":
    from moeflow.server.served_model import served_name
    from moeflow.server.settings import ServerSettings

    return ServerSettings(
        model_name=served_name(source),
        host=arguments.host,
        api_key=arguments.api_key if arguments.api_key is not None else os.environ.get(_KEY),
        insecure=arguments.insecure,
        allowed_hosts=tuple(arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
        max_batch_size=arguments.max_batch_size,
        max_step_tokens=arguments.max_step_tokens,
        kv_memory=arguments.kv_memory,
        kv_disk=arguments.kv_disk,
        **kept_options(arguments),
        context=arguments.context,
        max_waiting=arguments.max_waiting,
        grace_s=arguments.grace,
        log_prompts=arguments.log_prompts,
    )


def _run(
    arguments: argparse.Namespace, source: str, settings: "ServerSettings", bound: "socket.socket", signals: "_Signals"
) -> None:
    """Answer until a signal comes."""
    from moeflow.hf.vision.processors import load_processor
    from moeflow.server.app import build_app
    from moeflow.server.service import Service
    from moeflow.server.wire.http_server import HttpServer

    service = Service(settings)
    with ExitStack() as held, HttpServer(build_app(service), bound, settings) as server:  # the model is closed last
        try:
            _tell(f"{server.url} is loading {source}")
            model, tokenizer = load_model(source, arguments, tell=service.tell, kv_memory=arguments.kv_memory)
            held.enter_context(model.moeflow)
            signals.check()
            service.tell("writing the decode step as a program")
            prepare_step(model)
            service.tell("loading the processor of images")
            service.open(model, tokenizer, *load_processor(source))
            _tell(f"{server.url} answers for {settings.model_name}; Ctrl-C stops it")
            signals.wait()
        except KeyboardInterrupt as stop:
            _stop(service, 0 if isinstance(stop, _Terminated) else 130)
            raise


def _stop(service: "Service", code: int) -> None:
    """Let running answers finish; the next signal ends the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    grace_s, running = service.settings.grace_s, service.num_under_way
    if running:
        _tell(f"{running} answers may finish within {grace_s:g} seconds; Ctrl-C again ends them at once")
    service.drain(grace_s)


class _Signals:
    """Ctrl-C and SIGTERM interrupt the main thread; one that code of another swallowed is raised at the next check."""

    def __init__(self) -> None:
        self._came: type[KeyboardInterrupt] | None = None  # no Event: a handler may run within another's call of set()
        self._before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def __enter__(self) -> "_Signals":
        for number, _ in self._before:
            signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise the interrupt that came."""
        if self._came is not None:
            raise self._came

    def wait(self) -> None:
        """Wait for one and raise it."""
        while True:
            self.check()
            time.sleep(_CHECK_S)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        raise self._came


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("moeflow.server", "uvicorn.error")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    loggers[0].setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _tell(text: str) -> None:
    print(f"moeflow: {text}", file=sys.stderr, flush=True)
