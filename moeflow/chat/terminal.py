"""The line editor of the chat: keys, completion of commands, and the history of what was typed.

Knows prompt_toolkit. Knows nothing of conversations or models.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from moeflow.paths import cache_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyPressEvent


def prompt_session(stdin: TextIO, stdout: TextIO, commands: list[str]) -> PromptSession[str]:
    """Open a session that reads messages of one or more lines.

    Args:
        stdin: the terminal that is read.
        stdout: where the prompt is shown; on standard error where this is no terminal.
        commands: words that Tab completes.
    """
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
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))
    def new_line(event: KeyPressEvent) -> None:
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


def _open_history() -> History:
    """Keep what was typed in the user's cache folder, readable by the user alone; in memory where that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = cache_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("r+b"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
