"""Tests mirror the rooms: every module has a test file of its name, or stands in the table of tests/README.md."""

import re

import pytest

from helpers.paths import ROOT
from helpers.source_tree import SIDE_PACKAGES

TESTS = ROOT / "tests"


def modules() -> list[str]:
    """Every module of the package by its path, rooms of moeflow/ without that name: offload/runtime."""
    found = []
    for top in ("moeflow", *SIDE_PACKAGES):
        for file in (ROOT / top).rglob("*.py"):
            if file.name != "__init__.py":
                path = file.relative_to(ROOT / "moeflow" if top == "moeflow" else ROOT)
                found.append(path.with_suffix("").as_posix())
    return sorted(found)


def has_test_of_its_name(module: str) -> bool:
    """Whether tests/<folder>/test_<file>.py is there, in the folder of the module or in one above it in the room."""
    *folders, name = module.split("/")
    places = range(len(folders), 0, -1) if folders else [0]
    return any((TESTS.joinpath(*folders[:depth]) / f"test_{name}.py").is_file() for depth in places)


def table() -> dict[str, str]:
    """Return the README's table: of each module, the test files that cover it."""
    text = (TESTS / "README.md").read_text()
    rows = text.partition("| tested in | modules |\n|---|---|\n")[2].splitlines()
    assert rows, "tests/README.md has no table of modules"
    cells = [row.strip("|").split("|") for row in rows if row.startswith("|")]
    return {module: files for files, named in cells for module in re.findall(r"`([^`]+)`", named)}


TABLE = table()


@pytest.mark.parametrize("module", modules())
def test_every_module_is_tested_by_name_or_stands_in_the_table(module):
    if has_test_of_its_name(module):
        assert module not in TABLE, f"{module} has a test file of its name: take it out of the table of tests/README.md"
    else:
        assert module in TABLE, f"no test file is called after {module}, and tests/README.md does not say what tests it"


def test_the_table_names_modules_and_test_files_that_are_there():
    gone = sorted(set(TABLE) - set(modules()))
    assert not gone, f"the table of tests/README.md names modules that are not there: {gone}"
    for files in set(TABLE.values()):
        for file in re.findall(r"`([^`]+)`", files):
            assert (TESTS / file).is_file(), f"the table of tests/README.md names {file}, which is not there"
