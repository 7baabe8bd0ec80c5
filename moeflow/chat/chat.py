"""The terminal chat: the loop and its commands, and one answer for a prompt that comes from a pipe.

Any transformers causal language model will do; figures about experts appear when it has a `moeflow` handle.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moeflow.chat.answer import Answer, checkpoint_params
from moeflow.chat.answerer import Answerer
from moeflow.chat.conversation import Conversation
from moeflow.chat.figures import answer_figures, plan_lines, stats_line, stats_table
from moeflow.chat.screen import Screen, echo_off, write_pieces
from moeflow.chat.stop_flag import StopFlag
from moeflow.chat.terminal import prompt_session
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError
from moeflow.hf.encoding import check_text

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeflow.offload.stats import RuntimeStats

_LEAVING = "Ctrl-D or /exit leaves"
_NO_TEMPLATE = "this tokenizer has no chat template: the model continues the text instead of answering it"


class Chat:
    """One interactive session: reads lines, runs commands, has the model answer the rest."""

    def __init__(
        self,
        stdin: TextIO,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        screen: Screen,
        conversation: Conversation,
        params: SamplingParams,
    ) -> None:
        self.stdin = stdin
        self.model = model
        self.tokenizer = tokenizer
        self.screen = screen
        self.conversation = conversation
        self.params = params
        self.answerer = Answerer(model, tokenizer)
        self.stop = StopFlag()
        self.commands: dict[str, tuple[Callable[[str], None] | None, str, str]] = {  # name: what runs, wants and means
            "/reset": (self._reset, "", "forget the conversation, keep the system prompt"),
            "/system": (self._system, " TEXT", "set the system prompt; without TEXT remove it"),
            "/save": (self._save, " FILE", "write the conversation to FILE as JSON"),
            "/load": (self._load, " FILE", "continue the conversation in FILE"),
            "/stats": (self._stats, "", "show what the experts did since the model was loaded"),
            "/help": (self._help, "", "show this list"),
            "/exit": (None, "", "leave, like Ctrl-D"),
        }

    def run(self, session: PromptSession[str]) -> int:
        """Read and answer until the user leaves.

        Args:
            session: a prompt_toolkit session.
        """
        # For the whole session, not only while answering: a second Ctrl-C just after the first must not end it.
        previous_handler = signal.signal(signal.SIGINT, lambda *_: self.stop.set())
        try:
            while self._turn(session):
                pass
        finally:
            signal.signal(signal.SIGINT, previous_handler)
        return 0

    def _turn(self, session: PromptSession[str]) -> bool:
        """Read one message and deal with it; returns whether to go on."""
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            self.screen.note(f"line cleared; {_LEAVING}")
            return True
        except EOFError:
            return False
        word, _, argument = line.strip().partition(" ")
        if line.startswith("/") and word == "/exit":
            return False
        try:
            if line.startswith("/"):
                self._command(word, argument.strip())
            elif line.strip():
                self._answer(line.strip())
        except MoeflowError as error:
            self.screen.note(f"error: {error}", style="red")
        return True

    def _command(self, word: str, argument: str) -> None:
        if word not in self.commands:
            raise MoeflowError(f"there is no command {word}; /help lists them, a space before / sends it as text")
        run, wanted, _ = self.commands[word]
        if wanted == " FILE" and not argument:
            raise MoeflowError(f"{word} needs a file: {word}{wanted}")
        assert run is not None, "/exit is dealt with before"
        run(argument)

    def _answer(self, text: str) -> None:
        turns = self.conversation.turns
        turns.append({"role": "user", "content": text})
        self.stop.clear()
        try:
            with echo_off(self.stdin):
                answer, before, after = _answer_once(
                    self.answerer, self.model, self.tokenizer, self.conversation, self.params, self.stop,
                    show=lambda pieces: self.screen.show(pieces, self.stop), note=self.screen.note,
                )  # fmt: skip
        except (MoeflowError, RuntimeError, OSError) as error:
            # Out of memory, a failing disk: the conversation so far is worth more than the program's end.
            turns.pop()
            raise MoeflowError(f"{error} (this message is not part of the conversation)") from error
        turns.append({"role": "assistant", "content": answer.text})
        self.screen.note(stats_line(before, after, answer) + "\n")

    def _reset(self, argument: str) -> None:
        self.conversation.turns.clear()
        self.screen.note("conversation forgotten")

    def _system(self, argument: str) -> None:
        self.conversation.system = check_text(argument, "the system prompt") or None
        self.screen.note("system prompt set" if argument else "system prompt removed")

    def _save(self, argument: str) -> None:
        path = Path(argument).expanduser()
        self.conversation.save(path)
        self.screen.note(f"{len(self.conversation.messages)} messages saved to {path}")

    def _load(self, argument: str) -> None:
        path = Path(argument).expanduser()
        self.conversation = Conversation.load(path)
        self.screen.note(f"{len(self.conversation.messages)} messages loaded from {path}")

    def _stats(self, argument: str) -> None:
        stats = _snapshot(self.model)
        if stats is None:
            raise MoeflowError("this model runs without moeflow, so nothing was counted")
        self.screen.console.print(stats_table(stats))

    def _help(self, argument: str) -> None:
        for name, (_, wanted, meaning) in self.commands.items():
            self.screen.note(f"{name + wanted:<14}{meaning}", style="")
        self.screen.note(
            f"Alt-Enter or a \\ at the end begins a new line; Ctrl-C stops an answer; {_LEAVING}", style=""
        )


def run_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    system: str | None = None,
    as_json: bool = False,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Answer one prompt: the answer alone goes to stdout, its figures to stderr.

    Args:
        model: a transformers model, with or without a `moeflow` handle.
        tokenizer: its tokenizer.
        prompt: the user's message.
        params: the sampling; the checkpoint's where None.
        system: the system prompt.
        as_json: print one JSON object with the answer and its figures instead.
        stdout: where the answer goes.
        stderr: where figures and notes go.

    Returns:
        The exit code, 0.

    Raises:
        MoeflowError: the prompt is empty or does not fit the model's context, or the model failed.
    """
    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    if not prompt.strip():
        raise ConfigError("the prompt is empty; type one, or pipe text in")
    if not tokenizer.chat_template:
        print(_NO_TEMPLATE, file=stderr)
    conversation = Conversation(system, [{"role": "user", "content": prompt}])
    answer, before, after = _answer_once(
        Answerer(model, tokenizer), model, tokenizer, conversation, params or checkpoint_params(model),
        StopFlag(),
        show=list if as_json else lambda pieces: write_pieces(pieces, stdout),
        note=lambda text: print(text, file=stderr),
    )  # fmt: skip
    if as_json:
        print(json.dumps(answer_figures(before, after, answer), ensure_ascii=stdout.isatty()), file=stdout)
    else:
        print(stats_line(before, after, answer), file=stderr)
        if (kept := plan_lines(after)) is not None:
            print(kept, file=stderr)
    return 0


def run_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: SamplingParams | None = None,
    *,
    system: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    plain: bool | None = None,
    as_json: bool = False,
    name: str = "model",
) -> int:
    """Chat in the terminal, or answer the one prompt that a pipe delivers. Call it from the main thread.

    Args:
        model: a transformers model, with or without a `moeflow` handle.
        tokenizer: its tokenizer.
        params: the sampling; the checkpoint's where None. With a seed, the same messages get the same answers.
        system: the system prompt.
        stdin: where messages come from; a terminal makes the chat interactive.
        stdout: where answers go.
        plain: True for text without markup or colour; None decides by the terminal and NO_COLOR.
        as_json: print a piped prompt's answer as one JSON object.
        name: what to call the model.

    Returns:
        The exit code, 0.

    Raises:
        MoeflowError: a piped prompt is empty or not text, does not fit, or the model failed.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    if not stdin.isatty():
        return run_prompt(
            model, tokenizer, read_prompt(stdin), params, system=system, as_json=as_json, stdout=stdout,
        )  # fmt: skip
    if as_json:
        raise ConfigError("JSON output is for one prompt: pipe it in, as in `echo hello | moeflow chat ... --json`")
    screen = Screen(stdout, plain)
    screen.note(f"{name} · /help lists the commands · {_LEAVING}")
    if not tokenizer.chat_template:
        screen.note(_NO_TEMPLATE)
    chat = Chat(stdin, model, tokenizer, screen, Conversation(system), params or checkpoint_params(model))
    code = chat.run(prompt_session(stdin, stdout, list(chat.commands)))
    if (kept := plan_lines(_snapshot(model))) is not None:
        screen.note(kept)
    return code


def read_prompt(stdin: TextIO) -> str:
    """Return the prompt that a pipe delivers, without a byte-order mark and the last ends of lines.

    Raises:
        ConfigError: it is no text.
    """
    try:
        return check_text(stdin.read().removeprefix("\ufeff").rstrip("\r\n"), "the prompt on standard input")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on standard input is no UTF-8 text: {error}") from error


def _answer_once(
    answerer: Answerer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    params: SamplingParams,
    stop: StopFlag,
    show: Callable[[Iterable[str]], object],
    note: Callable[[str], None],
) -> tuple[Answer, RuntimeStats | None, RuntimeStats | None]:
    """Answer the conversation's last message; returns the answer and the model's counters around it."""
    input_ids, num_free, num_forgotten = conversation.fit(model, tokenizer, params.max_new_tokens)
    if num_forgotten:
        note(f"the context is full: forgot the oldest {num_forgotten} exchange{'s' * (num_forgotten > 1)}")
    if num_free < params.max_new_tokens:
        note(f"the context has room for {num_free} more tokens")
    seed = None if params.seed is None else (params.seed + len(conversation.turns)) % 2**63
    params = replace(params, max_new_tokens=num_free, seed=seed)
    before = _snapshot(model)
    with answerer.stream(input_ids, params, stop=stop) as stream:
        show(stream)
    assert stream.answer is not None, "an answer that was shown to its end"
    return stream.answer, before, _snapshot(model)


def _snapshot(model: PreTrainedModel) -> RuntimeStats | None:
    handle = getattr(model, "moeflow", None)
    return None if handle is None else handle.snapshot()
