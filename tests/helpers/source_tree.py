"""The package's source files in a checkout: modules, folders, rooms and imports, read without importing anything."""

import ast
import sys
from functools import cache, cached_property
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# They lie beside moeflow/ and are installed as its sub-packages; none imports another.
SIDE_PACKAGES = ("kernels", "placement", "predictors")
# A room imports only from rooms earlier in this order. The three side packages share one place.
ORDER = (
    "root", "side_packages", "machine", "checkpoint", "hub", "hf", "policy", "offload", "moe", "step", "trace",
    "replay", "calibration", "fit", "loading", "engine", "expert_parallel", "convert", "verify", "demo", "chat",
    "batch", "server", "doctor", "cli", "__main__",
)  # fmt: skip


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _lies_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


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
        for top in ("moeflow", *SIDE_PACKAGES):
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
        """Return where a module lives: a room of moeflow/, a side package, or the root."""
        first = module.split(".")[1] if "." in module else "root"
        if first in SIDE_PACKAGES or first == "__main__":
            return first
        return first if f"moeflow.{first}" in self.folders else "root"

    def place(self, module: str) -> int | None:
        """Return the place of a module's room in the order of rooms; None where the room has none."""
        room = "side_packages" if self.room(module) in SIDE_PACKAGES else self.room(module)
        return ORDER.index(room) if room in ORDER else None

    def imports(self, module: str) -> frozenset[str]:
        """Return the package's modules that a module imports at any depth of nesting, but for types alone."""
        if module not in self._imports:
            self._imports[module] = self._find_imports(module)
        return self._imports[module]

    def importers(self, folder: str) -> set[str]:
        """Return the rooms that import a folder's files; of its room, where files outside the folder do."""
        within = [other for other in self.folders if other.startswith(f"{folder}.")]
        found = set()
        for module in self.files:
            if not _lies_in(module, folder) and any(
                _lies_in(target, folder) and not any(_lies_in(target, other) for other in within)
                for target in self.imports(module)
            ):
                found.add(self.room(module))
        return found

    def sign(self, folder: str) -> str | None:
        """Return what a folder's sign says: the docstring of its `__init__.py`, or a side package's README."""
        name = folder.removeprefix("moeflow.")
        if name in SIDE_PACKAGES:
            readme = self.root / name / "README.md"
            return readme.read_text() if readme.is_file() else None
        return ast.get_docstring(self.syntax(folder)) if folder in self.files else None

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
