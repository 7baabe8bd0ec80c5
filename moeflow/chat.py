"""The terminal chat: a conversation, its commands, and how an answer appears on a screen or in a pipe.

Any transformers causal language model will do; figures about experts appear when it has a `moeflow` handle.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from moeflow.answer import stream_answer
from moeflow.errors import ConfigError, MoeflowError
from moeflow.report import Screen, answer_figures, stats_line, stats_table, write_pieces

_LEAVING = "Ctrl-D or /exit leaves"
_NO_TEMPLATE = "this tokenizer has no chat template: the model continues the text instead of answering it"


class Conversation:
    """The messages so far: an optional system prompt, then user and assistant in turn."""

    def __init__(self, system: str | None = None):
        self.system = system
        self.turns: list[dict] = []

    @property
    def messages(self) -> list[dict]:
        """Every message, the system prompt first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def save(self, path: Path) -> None:
        """Write the messages as JSON; a reader sees the old file or the whole new one.

        Raises:
            MoeflowError: the file cannot be written.
        """
        temporary = None
        try:
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                temporary = Path(file.name)
                json.dump(self.messages, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise MoeflowError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote, or any JSON list of messages with roles and text.

        Raises:
            MoeflowError: the file is missing, unreadable, not JSON, or not a conversation.
        """
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise MoeflowError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise MoeflowError(f"{path} is not JSON ({error}); /load takes a file that /save wrote") from error
        wanted = f"{path} is not a conversation: /load takes a JSON list of messages"
        if not isinstance(messages, list):
            raise MoeflowError(f"{wanted}, found {type(messages).__name__}")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise MoeflowError(f'{wanted} with "role" and "content" text; message {number} is something else')
        system = messages.pop(0)["content"] if messages and messages[0].get("role") == "system" else None
        roles = [message.get("role") for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise MoeflowError(f"{wanted} in which user and assistant take turns and the assistant is last")
        conversation = cls(system)
        conversation.turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        return conversation

    def encode(self, tokenizer):
        """Return the prompt for the next answer, [1, num_prompt_tokens]; without a chat template, plain text.

        Raises:
            MoeflowError: the chat template refuses the messages.
        """
        if not tokenizer.chat_template:
            text = "".join(m["content"] + ("" if m["role"] == "user" else "\n") for m in self.messages)
            return tokenizer(text, return_tensors="pt")["input_ids"]
        from jinja2 import TemplateError

        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        attempts = [self.messages]
        if self.system:
            # Gemma's and the first Mistrals' templates know no system role: then it goes before the first message.
            merged = {"role": "user", "content": f"{self.system}\n\n{self.turns[0]['content']}"}
            attempts.append([merged, *self.turns[1:]])
        for messages in attempts:
            try:
                return tokenizer.apply_chat_template(messages, **options)["input_ids"]
            except TemplateError as error:
                refusal = error
        raise MoeflowError(f"the model's chat template refuses this conversation: {refusal}") from refusal

    def fit(self, model, tokenizer, max_new_tokens: int):
        """Encode the conversation, forgetting its oldest exchanges until the answer has room.

        Args:
            model: its config names the context's length.
            tokenizer: the model's.
            max_new_tokens: tokens to keep free for the answer; more than half the context is never kept free.

        Returns:
            `(input_ids, max_new_tokens, num_forgotten)`: the prompt, the tokens there is room for, and the number
            of exchanges forgotten.

        Raises:
            MoeflowError: the last message alone does not fit.
        """
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        input_ids, num_forgotten = self.encode(tokenizer), 0
        if context is None:
            return input_ids, max_new_tokens, num_forgotten
        while input_ids.shape[1] > context - min(max_new_tokens, context // 2) and len(self.turns) > 1:
            del self.turns[:2]
            num_forgotten += 1
            input_ids = self.encode(tokenizer)
        num_free = context - input_ids.shape[1]
        if num_free < 1:
            raise MoeflowError(
                f"this message takes {input_ids.shape[1]} tokens with what surrounds it, and the model's context "
                f"is {context}: shorten it"
            )
        return input_ids, min(max_new_tokens, num_free), num_forgotten


class Chat:
    """One interactive session: reads lines, runs commands, has the model answer the rest."""

    def __init__(self, stdin, model, tokenizer, screen, conversation, max_new_tokens, sampling):
        self.stdin = stdin
        self.model = model
        self.tokenizer = tokenizer
        self.screen = screen
        self.conversation = conversation
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.stop_event = threading.Event()
        self.commands = {
            "/reset": (self._reset, "", "forget the conversation, keep the system prompt"),
            "/system": (self._system, " TEXT", "set the system prompt; without TEXT remove it"),
            "/save": (self._save, " FILE", "write the conversation to FILE as JSON"),
            "/load": (self._load, " FILE", "continue the conversation in FILE"),
            "/stats": (self._stats, "", "show what the experts did since the model was loaded"),
            "/help": (self._help, "", "show this list"),
            "/exit": (None, "", "leave, like Ctrl-D"),
        }

    def run(self, session) -> int:
        """Read and answer until the user leaves.

        Args:
            session: a prompt_toolkit session.
        """
        # For the whole session, not only while answering: a second Ctrl-C just after the first must not end it.
        previous_handler = signal.signal(signal.SIGINT, lambda *_: self.stop_event.set())
        try:
            while self._turn(session):
                pass
        finally:
            signal.signal(signal.SIGINT, previous_handler)
        return 0

    def _turn(self, session):
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

    def _command(self, word, argument):
        if word not in self.commands:
            raise MoeflowError(f"there is no command {word}; /help lists them, a space before / sends it as text")
        run, wanted, _ = self.commands[word]
        if wanted == " FILE" and not argument:
            raise MoeflowError(f"{word} needs a file: {word}{wanted}")
        run(argument)

    def _answer(self, text):
        turns = self.conversation.turns
        turns.append({"role": "user", "content": text})
        self.stop_event.clear()
        try:
            with _echo_off(self.stdin):
                answer, before, after = _answer_once(
                    self.model, self.tokenizer, self.conversation, self.max_new_tokens, self.sampling, self.stop_event,
                    show=lambda pieces: self.screen.show(pieces, self.stop_event), note=self.screen.note,
                )  # fmt: skip
        except (MoeflowError, RuntimeError, OSError) as error:
            # Out of memory, a failing disk: the conversation so far is worth more than the program's end.
            turns.pop()
            raise MoeflowError(f"{error} (this message is not part of the conversation)") from error
        turns.append({"role": "assistant", "content": answer.text})
        self.screen.note(stats_line(before, after, answer) + "\n")

    def _reset(self, argument):
        self.conversation.turns.clear()
        self.screen.note("conversation forgotten")

    def _system(self, argument):
        self.conversation.system = argument or None
        self.screen.note("system prompt set" if argument else "system prompt removed")

    def _save(self, argument):
        path = Path(argument).expanduser()
        self.conversation.save(path)
        self.screen.note(f"{len(self.conversation.messages)} messages saved to {path}")

    def _load(self, argument):
        path = Path(argument).expanduser()
        self.conversation = Conversation.load(path)
        self.screen.note(f"{len(self.conversation.messages)} messages loaded from {path}")

    def _stats(self, argument):
        stats = _stats(self.model)
        if stats is None:
            raise MoeflowError("this model runs without moeflow, so nothing was counted")
        self.screen.console.print(stats_table(stats))

    def _help(self, argument):
        for name, (_, wanted, meaning) in self.commands.items():
            self.screen.note(f"{name + wanted:<14}{meaning}", style="")
        self.screen.note(
            f"Alt-Enter or a \\ at the end begins a new line; Ctrl-C stops an answer; {_LEAVING}", style=""
        )


def run_prompt(
    model,
    tokenizer,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    as_json: bool = False,
    stdout=None,
    stderr=None,
) -> int:
    """Answer one prompt: the answer alone goes to stdout, its figures to stderr.

    Args:
        model: a transformers model, with or without a `moeflow` handle.
        tokenizer: its tokenizer.
        prompt: the user's message.
        system: the system prompt.
        max_new_tokens: most tokens of the answer.
        temperature: 0 decodes greedily; this, top_p and top_k follow the checkpoint where None.
        top_p: share of the probability sampled from.
        top_k: number of tokens sampled from.
        seed: seed of the sampling.
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
    conversation = Conversation(system)
    conversation.turns.append({"role": "user", "content": prompt})
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    answer, before, after = _answer_once(
        model, tokenizer, conversation, max_new_tokens, sampling, threading.Event(),
        show=list if as_json else lambda pieces: write_pieces(pieces, stdout),
        note=lambda text: print(text, file=stderr),
    )  # fmt: skip
    if as_json:
        print(json.dumps(answer_figures(before, after, answer), ensure_ascii=False), file=stdout)
    else:
        print(stats_line(before, after, answer), file=stderr)
    return 0


def run_chat(
    model,
    tokenizer,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stdin=None,
    stdout=None,
    plain: bool | None = None,
    as_json: bool = False,
    name: str = "model",
) -> int:
    """Chat in the terminal, or answer the one prompt that a pipe delivers. Call it from the main thread.

    Args:
        model: a transformers model, with or without a `moeflow` handle.
        tokenizer: its tokenizer.
        system: the system prompt.
        max_new_tokens: most tokens of one answer.
        temperature: 0 decodes greedily; this, top_p and top_k follow the checkpoint where None.
        top_p: share of the probability sampled from.
        top_k: number of tokens sampled from.
        seed: seed of the sampling; the same messages then get the same answers.
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
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    if not stdin.isatty():
        try:
            prompt = stdin.read().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"the prompt on stdin is not text: {error}") from error
        return run_prompt(
            model, tokenizer, prompt,
            system=system, max_new_tokens=max_new_tokens, as_json=as_json, stdout=stdout, **sampling,
        )  # fmt: skip
    if as_json:
        raise ConfigError("JSON output is for one prompt: pipe it in, as in `echo hello | moeflow chat ... --json`")
    if plain is None:
        plain = not stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    screen = Screen(stdout, plain)
    screen.note(f"{name} · /help lists the commands · {_LEAVING}")
    if not tokenizer.chat_template:
        screen.note(_NO_TEMPLATE)
    chat = Chat(stdin, model, tokenizer, screen, Conversation(system), max_new_tokens, sampling)
    return chat.run(_prompt_session(stdin, stdout, list(chat.commands)))


def _answer_once(model, tokenizer, conversation, max_new_tokens, sampling, stop_event, show, note):
    """Answer the conversation's last message; returns the answer and the model's counters around it."""
    input_ids, num_free, num_forgotten = conversation.fit(model, tokenizer, max_new_tokens)
    if num_forgotten:
        note(f"the context is full: forgot the oldest {num_forgotten} exchange{'s' * (num_forgotten > 1)}")
    if num_free < max_new_tokens:
        note(f"the context has room for {num_free} more tokens")
    if sampling["seed"] is not None:
        sampling = {**sampling, "seed": sampling["seed"] + len(conversation.turns)}
    before = _stats(model)
    with stream_answer(
        model, tokenizer, input_ids, max_new_tokens=num_free, stop_event=stop_event, **sampling
    ) as stream:
        show(stream)
    return stream.answer, before, _stats(model)


def _stats(model):
    handle = getattr(model, "moeflow", None)
    return None if handle is None else handle.stats()


@contextmanager
def _echo_off(terminal):
    """Keep what is typed during an answer out of it: the terminal hands it to the next prompt instead."""
    import termios

    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _prompt_session(stdin, stdout, commands):
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.input import create_input
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.utils import is_dumb_terminal

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def accept(event):
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))
    def new_line(event):
        event.current_buffer.insert_text("\n")

    return PromptSession(
        input=create_input(stdin),
        # On a dumb terminal prompt_toolkit reads plain lines, but only where the output is left to it.
        output=None if is_dumb_terminal() else create_output(stdout if stdout.isatty() else sys.stderr),
        history=_open_history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        enable_suspend=True,
    )


def _open_history():
    """Keep what was typed in the user's cache folder, readable by the user alone; in memory where that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("MOEFLOW_CACHE") or Path(cache) / "moeflow").expanduser() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("r+b"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
