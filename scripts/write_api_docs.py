"""The file docs/api.md: the public names of moeflow, written from their docstrings and signatures.

    python scripts/write_api_docs.py            # write docs/api.md
    python scripts/write_api_docs.py --check    # exit with 1 and the first name whose text differs

Reads source files alone: imports neither torch nor a model.
"""

import argparse
import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT)]

PAGE = _ROOT / "docs" / "api.md"
_BEGINNING = """\
# The public names

`from moeflow import load_moe, fit, Engine, SamplingParams, MoeflowError` and
`from moeflow.server import create_app, ServerSettings`. These names and the objects that they return are
public; everything else may move. `python scripts/write_api_docs.py` writes this page from the docstrings.
[loading.md](loading.md) has the options of `load_moe` as a table and explains the counters.
"""
# Title, module, name, and the members to describe: None for all public ones.
_NAMES = (
    ("load_moe", "moeflow.loading.load_moe", "load_moe", ()),
    (
        "model.moeflow",
        "moeflow.offload.runtime",
        "ExpertRuntime",
        ("closed", "stats", "snapshot", "reset_stats", "close"),
    ),
    ("model.moeflow.stats()", "moeflow.offload.stats", "RuntimeStats", ()),
    ('model.moeflow.stats()["decode"]', "moeflow.offload.stats", "PhaseStats", ()),
    ('model.moeflow.stats()["decode"]["decisions"]', "moeflow.offload.stats", "Decisions", ()),
    ('model.moeflow.stats()["prediction"]', "moeflow.offload.stats", "PredictionStats", ()),
    ('model.moeflow.stats()["io"]', "moeflow.offload.stats", "ReadStats", ()),
    ("fit", "moeflow.fit.fit", "fit", ()),
    ("Plan", "moeflow.fit.plan", "Plan", None),
    ("Engine", "moeflow.engine.engine", "Engine", None),
    ("SamplingParams", "moeflow.engine.sampling_params", "SamplingParams", ()),
    ("Completion", "moeflow.engine.request", "Completion", ()),
    ("StepOutput", "moeflow.engine.request", "StepOutput", ()),
    ("moeflow.server.create_app", "moeflow.server.app", "create_app", ()),
    ("moeflow.server.ServerSettings", "moeflow.server.settings", "ServerSettings", ()),
)
_ERRORS = "moeflow.errors"
_Definition = ast.ClassDef | ast.FunctionDef


def page() -> str:
    """Return the text of docs/api.md."""
    return "\n".join([_BEGINNING, *(f"## {title}\n\n{text}\n" for title, text in sections().items())])


def sections() -> dict[str, str]:
    """Return the text below each title, in the order of the page."""
    found = {title: "\n\n".join(_describe(_find(module, name), members)) for title, module, name, members in _NAMES}
    errors = [node for node in _tree(_ERRORS).body if isinstance(node, ast.ClassDef)]
    rows = [f"| `{node.name}` | {', '.join(map(ast.unparse, node.bases))} | {_summary(node)} |" for node in errors]
    found["Errors"] = "\n".join([f"In `{_ERRORS}`.\n", "| error | is a | meaning |", "|---|---|---|", *rows])
    return found


def differing(text: str) -> str | None:
    """Return the first title of `text`, a docs/api.md, whose section is not what the source says; None for none."""
    written = dict(re.findall(r"^## ([^\n]*)\n\n(.*?)\n*(?=^## |\Z)", text, re.M | re.S))
    now = sections()
    for title in [*now, *written]:
        if written.get(title) != now.get(title):
            return title
    return None if text == page() else "the text around the names"


def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no {module}"
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _find(module: str, name: str) -> _Definition:
    for node in _tree(module).body:
        if isinstance(node, _Definition) and node.name == name:
            return node
    raise LookupError(f"{module} has no {name}")


def _describe(node: _Definition, members: tuple[str, ...] | None) -> Iterator[str]:
    """Yield the paragraphs about a function, or about a class and its members."""
    if isinstance(node, ast.FunctionDef):
        yield _signature(node)
        yield _prose(_doc(node))
        return
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    for method in methods:
        if method.name == "__init__" and members is None:
            yield _signature(method, node.name)
    fields = [_field(child) for child in node.body if isinstance(child, ast.AnnAssign)]
    if fields:
        yield "\n".join(["```python", *fields, "```"])
    yield _summary(node) if members else _prose(_doc(node))  # load_moe builds the one class with chosen members
    public = [method for method in methods if method.name[0] != "_" and method.name != "check_integrity"]
    for method in public:
        if members is None or method.name in members:
            is_property = any(ast.unparse(one) == "property" for one in method.decorator_list)
            yield f"### {node.name}.{method.name}"
            yield f"A property, `{ast.unparse(method.returns)}`." if is_property else _signature(method)
            yield _prose(_doc(method))


def _field(node: ast.AnnAssign) -> str:
    """Return a dataclass's field as code, its default where that is plain."""
    if isinstance(node.value, ast.Call):
        kind = node.annotation
        is_text = isinstance(kind, ast.Constant) and isinstance(
            kind.value, str
        )  # a name that is imported for types alone
        return f"{ast.unparse(node.target)}: {kind.value if is_text else ast.unparse(kind)}"
    return ast.unparse(node).replace("'", '"')  # a list of fields is Python, which ruff formats


def _signature(node: ast.FunctionDef, name: str | None = None) -> str:
    """Return a function's signature as code, one argument a line where there are many."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg == "self":
        arguments = ast.arguments(
            arguments.posonlyargs, arguments.args[1:], arguments.vararg, arguments.kwonlyargs,
            arguments.kw_defaults, arguments.kwarg, arguments.defaults,
        )  # fmt: skip
    listed = _arguments(arguments)
    returns = "" if node.returns is None or name else f" -> {ast.unparse(node.returns)}"
    line = f"{name or node.name}({', '.join(listed)}){returns}"
    if len(line) > 100:
        line = "\n".join([f"{name or node.name}(", *(f"    {one}," for one in listed), f"){returns}"])
    return f"```python\n{line}\n```"


def _arguments(arguments: ast.arguments) -> list[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    listed = [_argument(one, default) for one, default in zip(plain, defaults, strict=True)]
    if arguments.vararg or arguments.kwonlyargs:
        listed.append("*" + (_argument(arguments.vararg, None) if arguments.vararg else ""))
    listed += map(_argument, arguments.kwonlyargs, arguments.kw_defaults)
    return listed + ([f"**{_argument(arguments.kwarg, None)}"] if arguments.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = "" if argument.annotation is None else f": {ast.unparse(argument.annotation)}"
    equals = " = " if kind else "="
    return argument.arg + kind + ("" if default is None else equals + ast.unparse(default))


def _doc(node: _Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _summary(node: _Definition) -> str:
    return " ".join(_doc(node).partition("\n\n")[0].split())


def _prose(doc: str) -> str:
    """Return a docstring as markdown: what is indented below a line that ends with a colon becomes a list."""
    paragraphs: list[str] = []
    for block in doc.split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and all(line.startswith("    ") for line in lines[1:]) and lines[0].endswith(":"):
            paragraphs += [f"**{lines[0]}**" if lines[0][:-1].isidentifier() else lines[0], _items(lines[1:])]
        elif lines and all(line.startswith("    ") for line in lines):
            paragraphs.append(_items(lines))
        else:
            paragraphs.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(paragraphs)


def _items(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if line.startswith("     ") and items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    named = [re.fullmatch(r"(\*{0,2}\w+): (.*)", item, re.S) for item in items]
    if not all(named):
        return " ".join(items)
    return "\n".join(f"- `{match[1]}`: {match[2]}" for match in named if match)


def main(argv: list[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page differs")
    if not parser.parse_args(argv).check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    name = differing(PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "")
    if name is not None:
        print(f"docs/api.md differs: {name}. Run python scripts/write_api_docs.py.", file=sys.stderr)
    return int(name is not None)


if __name__ == "__main__":
    sys.exit(main())
