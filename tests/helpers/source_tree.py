"""The package's source files in a checkout: modules, folders, rooms and imports, read without importing anything."""

import ast
import sys
from functools import cache, cached_property
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FAMILIES = ("kernels", "placement", "predictors")
# A room imports only from rooms before it; the three families stand side by side and know only the root files.
ORDER = (
    "root", "families", "checkpoint", "hf", "policy", "offload", "moe", "trace", "replay", "calibration", "loading",
    "engine", "expert_parallel", "convert", "demo", "chat", "batch", "cli", "__main__",
)  # fmt: skip


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


class SourceTree:
    """The package as its source files say it is.

    Args:
        root: the folder with pyproject.toml.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._imports: dict[str, frozenset[str]] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every module of the package by dotted name; a folder's `__init__.py` by the folder's."""
        found = {}
        for top in ("moeflow", *FAMILIES):
            for file in sorted((self.root / top).rglob("*.py")):
                parts = file.relative_to(self.root).with_suffix("").parts
                parts = parts if top == "moeflow" else ("moeflow", *parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        return found

    @cached_property
    def folders(self) -> set[str]:
        """Every folder with Python files, by dotted name."""
        parents = {module.rpartition(".")[0] for module in self.files}
        signed = {module for module, file in self.files.items() if file.name == "__init__.py"}
        return (parents | signed | {"moeflow"}) - {""}

    @cached_property
    def setuptools(self) -> dict:
        """pyproject's table `tool.setuptools`."""
        return tomllib.loads((self.root / "pyproject.toml").read_text())["tool"]["setuptools"]

    def syntax(self, module: str) -> ast.Module:
        """Return a module's syntax tree."""
        return _parsed(self.files[module].read_text())

    def room(self, module: str) -> str:
        """Return where a module lives: a room of moeflow/, a family, or the root."""
        first = module.split(".")[1] if "." in module else "root"
        if first in FAMILIES or first == "__main__":
            return first
        return first if f"moeflow.{first}" in self.folders else "root"

    def floor(self, module: str) -> int | None:
        """Return the place of a module's room in the order of imports; None where the room has none."""
        room = "families" if self.room(module) in FAMILIES else self.room(module)
        return ORDER.index(room) if room in ORDER else None

    def imports(self, module: str) -> frozenset[str]:
        """Return the package's modules that a module imports at any depth of nesting, but for types alone."""
        if module not in self._imports:
            self._imports[module] = self._find_imports(module)
        return self._imports[module]

    def _find_imports(self, module: str) -> frozenset[str]:
        found: set[str] = set()
        waiting: list[ast.AST] = [self.syntax(module)]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting += node.orelse
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moeflow":
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in self.files else str(node.module) for name in named}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "moeflow"}
            waiting += ast.iter_child_nodes(node)
        return frozenset(found - {module, "moeflow"})
