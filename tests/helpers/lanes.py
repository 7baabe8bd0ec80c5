"""The lanes of the tests: which files need torch, read from their imports without running them, and which mark a run
selects.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import moeflow
from helpers.paths import ROOT
from helpers.source_tree import SourceTree

_MODEL_LIBRARIES = {"torch", "transformers", "tokenizers", "accelerate", "triton", "gguf"}
_PACKAGE = SourceTree(ROOT).files


def selects(mark: str, expression: str) -> bool:
    """Return whether pytest's `-m EXPRESSION` asks for tests because they have a mark."""
    names = sorted(set(re.findall(r"[A-Za-z_]\w*", expression)) - {"and", "or", "not", mark})
    for values in itertools.product((False, True), repeat=len(names)):
        marks = dict(zip(names, values, strict=True))
        try:
            without, chosen = (eval(expression, {"__builtins__": {}}, {**marks, mark: has}) for has in (False, True))
        except (SyntaxError, NameError, TypeError):  # no expression of bare marks: pytest itself says so
            return False
        if chosen and not without:
            return True
    return False


@cache
def needs_torch(file: Path) -> bool:
    """Return whether importing a file imports torch or a library that stands on it."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in _imports(current):
            if name.split(".")[0] in _MODEL_LIBRARIES or name == "safetensors.torch":
                return True
            waiting += _files_of(name)
    return False


@cache
def _imports(file: Path) -> frozenset[str]:
    """Return the dotted names that a file imports when it is imported itself; `a.b` also for `from a import b`."""
    found: set[str] = set()
    for node in _run_at_import(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_for_types and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _run_at_import(child)


def _files_of(name: str) -> list[Path]:
    """Return the files of this checkout that importing a dotted name runs."""
    package, _, last = name.rpartition(".")
    if package == "moeflow" and last in moeflow._HOMES:
        return _files_of(moeflow._HOMES[last])
    if name.split(".")[0] == "moeflow":
        parts = name.split(".")
        above = (".".join(parts[: end + 1]) for end in range(1, len(parts)))
        return [_PACKAGE[module] for module in above if module in _PACKAGE]
    path = name.replace(".", "/")
    candidates = [ROOT / folder / f"{path}{end}" for folder in ("tests", "scripts") for end in (".py", "/__init__.py")]
    return [file for file in candidates if file.is_file()]
