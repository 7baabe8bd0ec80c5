"""docs/cli.md holds the --help of every command, as the parser prints it."""

import os
import re
import subprocess
import sys

import write_cli_docs as script
from helpers.paths import ROOT


def test_page_is_the_parsers_help():
    name = script.differing((ROOT / "docs" / "cli.md").read_text())
    assert name is None, f"docs/cli.md differs from the --help of `{name}`: run python scripts/write_cli_docs.py"


def test_check_names_the_command_that_differs(tmp_path, monkeypatch, capsys):
    page = tmp_path / "cli.md"
    monkeypatch.setattr(script, "PAGE", page)
    whole = script.page()
    for text, name in (
        (whole.replace("--residency LIST", "--residency X"), "moeflow trace replay"),
        (whole[: whole.index("## moeflow demo-model")], "moeflow demo-model"),
        (whole + "\n## moeflow fly\n\n```text\nusage\n```\n", "moeflow fly"),
        (whole.replace("# The command line", "# Commands"), "the text around"),
    ):
        page.write_text(text)
        assert script.main(["--check"]) == 1
        assert name in capsys.readouterr().err
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0


def test_page_names_each_option_that_the_program_prints():
    """The page is laid out by the script; its words are those of the installed program's own help."""
    helps = script.helps()
    for name in ("moeflow", "moeflow trace replay", "moeflow place"):
        command = [sys.executable, "-m", *name.split(), "--help"]
        wide = {**os.environ, "COLUMNS": "10000"}  # no word is broken
        printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=wide).stdout
        words = set(re.findall(r"[\w-]+", printed))
        assert words - set(re.findall(r"[\w-]+", helps[name])) == set()
