"""Compiling the text that binds an answer, first on trial in a process of its own, which has limits of time and memory.

llguidance's own limits do not hold where it prepares a grammar: `{"multipleOf": 10000019}` alone takes minutes and
gigabytes. Knows llguidance. Knows nothing of models' tokenizers. Imports no torch, so that a trial starts at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CPU_S = 4  # of a trial
_MOST_S = 20.0  # of a trial on a machine that does other things as well
_MOST_BYTES = 512 << 20  # address space of a trial, of which Python takes a fifth
_MOST_LEXER_STATES = 20_000  # of a grammar, 1 to 2 kB each
_MOST_SYMBOLS = 200_000  # in a grammar's productions
_MOST_LETTERS = 300  # of what llguidance says
_REFUSED = 3  # a trial's exit status
# As Python's json writes: no free white space, in which a model could go on for ever and of which nothing is forced.
_JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TRIAL = "import sys; sys.path[:] = sys.argv[1:]; from moeflow.engine.structure import compiling; compiling.run_trial()"


def compiled(tokens: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """Compile a text.

    Args:
        tokens: of which answers are made.
        kind: "json_schema", "regex" or "grammar".
        text: of this kind.

    Raises:
        ConfigError: llguidance refuses it; the message tells why.
    """
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_FORM)
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_lark(text)
    limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, max_grammar_size=_MOST_SYMBOLS, verbose_errors=False)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ConfigError(f"{kind} cannot be compiled: {reason(matcher)}")
    return matcher


def reason(matcher: LLMatcher) -> str:
    """Return in one line what llguidance says is wrong."""
    text = matcher.get_error().split("<backtrace>")[0].split("<non-verbose/>")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    return told if len(told) <= _MOST_LETTERS else f"{told[:_MOST_LETTERS]}..."


def check_compiles(kind: str, text: str, size: int = 0, special: dict[int, str] | None = None) -> None:
    """Compile a text on trial, which takes a tenth of a second.

    Args:
        kind: "json_schema", "regex" or "grammar".
        text: of this kind.
        size: tokens of the model's tokenizer, which a grammar may name by number.
        special: token id: text of the special ones, which it may name.

    Raises:
        ConfigError: it cannot be compiled, or not within limits.
    """
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL, *filter(None, sys.path)],
            input=json.dumps([kind, text, size, list((special or {}).items())]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_MOST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        trial = None
    except OSError as error:
        raise ConfigError(f"{kind} cannot be tried, since no process can be started: {error.strerror}.") from error
    if trial is not None and trial.returncode == _REFUSED:
        raise ConfigError(trial.stdout.decode())
    if trial is None or trial.returncode != 0:
        raise ConfigError(
            f"{kind} takes more than {MOST_CPU_S} s or {_MOST_BYTES >> 20} MiB to compile; make it simpler: fewer "
            "alternatives, smaller repeats, no large multipleOf"
        )


def run_trial() -> None:
    """Compile what standard input holds, for a vocabulary of single bytes: the process of `check_compiles`."""
    with suppress(ImportError, ValueError, OSError):  # where the system has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from llguidance import LLTokenizer, TokenizerWrapper

    kind, text, size, special = json.loads(sys.stdin.buffer.read())
    try:
        matcher = compiled(LLTokenizer(TokenizerWrapper(_Bytes(size, dict(special))), slices=[]), kind, text)
        matcher.compute_ff_tokens()
        matcher.compute_bitmask()
    except ConfigError as error:
        sys.stdout.buffer.write(str(error).encode())
        sys.stdout.flush()
        sys.exit(_REFUSED)


class _Bytes:
    """A tokenizer of one token a byte, as llguidance asks for one, with the special tokens of another."""

    bos_token_id = None

    def __init__(self, size: int, special: dict[int, str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b""] * (size - 256) + [b"<end>"]
        self.eos_token_id = len(self.tokens) - 1
        for token_id, text in special.items():
            self.tokens[token_id] = text.encode()
        self.special_token_ids = [*special, self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
