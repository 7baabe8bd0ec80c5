"""README, docs/ and CONTRIBUTING name files, anchors and modules that are there."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.source_tree import ORDER, SourceTree

READMES = ("kernels/README.md", "placement/README.md", "predictors/README.md", "scripts/bench/README.md")
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *READMES)
PAGES = sorted(path for path in [*map(ROOT.joinpath, NAMES), *(ROOT / "docs").glob("*.md")] if path.is_file())
TOPS = ("moeflow", "kernels", "placement", "predictors", "scripts", "tests", "docs")
TREE = SourceTree(ROOT)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may be, as GitHub builds it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(name: str) -> bool:
    """Whether a path of the checkout is there; `{a,b}` and `*` as a shell reads them."""
    begin, brace, rest = name.partition("{")
    if brace:
        middle, _, end = rest.partition("}")
        return all(exists(begin + part + end) for part in middle.split(","))
    return bool(list(ROOT.glob(name.rstrip("/")))) if "*" in name else (ROOT / name).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, and {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_backticks_are_there(page):
    for name in re.findall(rf"(?<![\w/.])((?:{'|'.join(TOPS)})/[\w./{{}},*-]*)", page.read_text()):
        name = name.rstrip(".,")
        assert exists(name) or (page.parent / name).exists(), f"{page.name} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_in_backticks_are_modules_or_in_one(page):
    for name in re.findall(r"`(moeflow(?:\.\w+)+)`", page.read_text()):
        assert resolves(name), f"{page.name} names {name}, which is neither a module nor in one"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_options_that_scripts_have(page):
    libraries = "".join(path.read_text() for path in (ROOT / "scripts" / "bench").glob("*.py"))
    text = page.read_text().replace("\\\n", " ")
    for script, arguments in re.findall(r"scripts/(\w+\.py)([^`\n]*)", text):
        source = (ROOT / "scripts" / script).read_text() + libraries
        for option in re.findall(r"(?<= )--[a-z][\w-]*", arguments):
            assert f'"{option}"' in source, f"{page.name} gives {script} the option {option}, which it does not have"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a name that a module defines or gives out."""
    module, _, last = name.rpartition(".")
    if name in TREE.files or name in TREE.folders:
        return True
    if module not in TREE.files:
        return False
    text = TREE.files[module].read_text()
    return bool(re.search(rf"^(?:class|def) {last}\b|^{last}\b.*=|\"{last}\":", text, re.M))


def test_architecture_has_the_rooms_in_their_order():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| room | what lives there |\n|---|---|\n")[2].partition("\n\n")[0]
    rooms = re.findall(r"^\| (\w+) \|", table, re.M)
    assert rooms == list(ORDER), "the rooms of docs/architecture.md are not those of ORDER in source_tree.py"


def test_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^\| `?(.*?)`? \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)[2:]
    keys = [re.sub(r"[-_]", " ", term.lower()) for term in terms]
    assert len(keys) > 50
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys))


def test_index_links_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in text, f"docs/index.md does not link {page.name}"


def test_readme_is_short():
    lines = len((ROOT / "README.md").read_text().splitlines())
    assert lines <= 150, f"README.md has {lines} lines"
