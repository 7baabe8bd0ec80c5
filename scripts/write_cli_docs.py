"""The file docs/cli.md: the `--help` of `moeflow` and of each command, taken from the parser itself.

    python scripts/write_cli_docs.py            # write docs/cli.md
    python scripts/write_cli_docs.py --check    # exit with 1 and the name of the first command whose help differs

Lines are laid out by this file, 98 characters wide, so that every version of Python writes the same text.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT)]

from moeflow.cli import main as command_line  # noqa: E402

PAGE = _ROOT / "docs" / "cli.md"
_WIDTH = 98  # what argparse takes where COLUMNS=100
_BEGINNING = """\
# The command line

The `--help` of `moeflow` and of each command. `python scripts/write_cli_docs.py` writes this page from the parser.
"""


class _FixedHelp(argparse.HelpFormatter):
    """The layout of help, which argparse changes from version to version."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=24, width=_WIDTH)

    def add_argument(self, action: argparse.Action) -> None:
        if action.help is argparse.SUPPRESS:
            return
        lengths = [len(self._format_action_invocation(action)) + self._current_indent]
        for command in self._iter_indented_subactions(action):
            lengths.append(len(self._format_action_invocation(command)) + self._current_indent)
        self._action_max_length = max(self._action_max_length, *lengths)
        self._add_item(self._format_action, [action])

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        self._width, width = 1 << 20, self._width  # one line, which is the same in all versions
        line = super()._format_usage(usage, actions, groups, prefix).strip()
        self._width = width
        head = f"usage: {self._prog}"
        lines = [head]
        for part in re.findall(r"\(.*?\)+(?=\s|$)|\[.*?\]+(?=\s|$)|\S+", line.removeprefix(head)):
            if len(lines[-1]) + 1 + len(part) > width:
                lines.append(" " * len(head))
            lines[-1] += f" {part}"
        return "\n".join(lines) + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def helps() -> dict[str, str]:
    """Return the help of each command by its name, in the order of the parser: "moeflow", "moeflow chat", ..."""
    return {parser.prog: _help(parser) for parser in _parsers(command_line._parser())}


def page() -> str:
    """Return the text of docs/cli.md."""
    return "\n".join([_BEGINNING, *(f"## {name}\n\n```text\n{text}```\n" for name, text in helps().items())])


def differing(text: str) -> str | None:
    """Return the name of the first command whose help in `text`, a docs/cli.md, is not the parser's; None for none."""
    written = dict(re.findall(r"^## ([^\n]*)\n\n```text\n(.*?)^```$", text, re.M | re.S))
    now = helps()
    for name in [*now, *written]:
        if written.get(name) != now.get(name):
            return name
    return None if text == page() else "the text around the commands"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _parsers(command)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = type("_FixedKind", (_FixedHelp, parser.formatter_class), {})
    return parser.format_help()


def main(argv: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page differs")
    if not parser.parse_args(argv).check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    name = differing(PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "")
    if name is not None:
        print(f"docs/cli.md differs: {name}. Run python scripts/write_cli_docs.py.", file=sys.stderr)
    return int(name is not None)


if __name__ == "__main__":
    sys.exit(main())
