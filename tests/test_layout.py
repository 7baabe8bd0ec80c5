"""The house: imports point down, no circle, every folder is listed and has its sign, one room knows transformers."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from helpers.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

FAMILIES = ("kernels", "placement", "predictors")
# A room imports only from rooms before it; the three families stand side by side and know only the root files.
ORDER = (
    "root", "families", "checkpoint", "hf", "policy", "offload", "moe", "trace", "replay", "calibration", "loading",
    "engine", "expert_parallel", "convert", "demo", "chat", "batch", "cli", "__main__",
)  # fmt: skip
MAX_LINES = 350
MAX_NAMES = 16  # in a folder of moeflow/, but for the command line's
# Attributes that belong to transformers and may change with it.
PRIVATE = {
    "_apply_gate", "act_fn", "has_post_expert_norm", "post_expert_norm", "past_key_values", "_experts_implementation",
    "_attn_implementation", "_is_hf_initialized", "_supports_attention_backend", "get_seq_length",
}  # fmt: skip


def python_files() -> dict[str, Path]:
    """Return every module of the package by dotted name; a folder's `__init__.py` by the folder's."""
    found = {}
    for top in ("moeflow", *FAMILIES):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "moeflow" else ("moeflow", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


FILES = python_files()
FOLDERS = {name for module in FILES for name in [module.rpartition(".")[0]] if name} | {"moeflow"}


def room(module: str) -> str:
    """Return where a module lives: a room of moeflow/, a family, or the root."""
    first = module.split(".")[1] if "." in module else "root"
    if first in FAMILIES or first == "__main__":
        return first
    return first if f"moeflow.{first}" in FOLDERS else "root"


def floor(module: str) -> int:
    """Return the place of a module's room in the order of imports."""
    name = room(module)
    assert name in ORDER or name in FAMILIES, f"the room of {module} has no place in the order of imports"
    return ORDER.index("families" if name in FAMILIES else name)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the package's modules that a module imports at any depth of nesting, but for types alone."""
    found = set()
    waiting = [ast.parse(FILES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moeflow":
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "moeflow"}
        waiting += ast.iter_child_nodes(node)
    return frozenset(found - {module, "moeflow"})


@pytest.mark.parametrize("module", [module for module in FILES if module != "moeflow"])
def test_imports_point_down(module):
    for target in sorted(imports(module)):
        assert target in FILES, f"{module} imports {target}, which is not there"
        if room(target) != room(module):
            assert floor(target) < floor(module), f"{module} imports {target}, which stands above it"


def test_no_circle_anywhere():
    graph = {module: imports(module) for module in FILES if module != "moeflow"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_every_folder_is_listed_for_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = setup["packages"]
    assert not (FOLDERS - set(listed)), f"folders left out of pyproject's packages: {sorted(FOLDERS - set(listed))}"
    assert not (set(listed) - FOLDERS), f"pyproject's packages that are not there: {sorted(set(listed) - FOLDERS)}"
    assert listed == sorted(listed), "keep the list sorted"
    assert setup["package-dir"] == {"moeflow": "moeflow", **{f"moeflow.{family}": family for family in FAMILIES}}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_every_folder_has_its_sign(folder):
    if folder.removeprefix("moeflow.") in FAMILIES:
        assert folder not in FILES, f"{folder} has an __init__.py: a bare package breaks transformers' probe"
        return
    assert folder in FILES, f"{folder} has no __init__.py"
    tree = ast.parse(FILES[folder].read_text())
    sign = ast.get_docstring(tree)
    assert sign, f"the __init__.py of {folder} has no docstring"
    if folder != "moeflow":
        assert "nothing" in sign, f"the sign of {folder} does not say what it knows nothing of"
        assert "import" in sign, f"the sign of {folder} does not say who imports it"


def test_no_room_takes_the_name_of_a_folder_beside_moeflow():
    beside = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"moeflow"}
    taken = beside & {path.name for path in (ROOT / "moeflow").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert not taken, f"moeflow/{taken} would be hidden by the folder of the checkout"


@pytest.mark.parametrize("module", FILES)
def test_only_hf_knows_transformers(module):
    """Its private attributes and its inner modules; what it exports at the top everyone may import."""
    tree = ast.parse(FILES[module].read_text())
    if room(module) in {"hf", *FAMILIES}:  # the families never see a model
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in PRIVATE, f"{module}:{node.lineno} touches transformers' {node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            assert node.module in {"transformers", "transformers.utils"}, f"{module} imports {node.module}"


def test_nothing_imports_the_oracles_of_regrouping():
    oracles = "moeflow.engine.regrouping.oracles"
    for module in FILES:
        if not module.startswith(oracles):
            assert not [target for target in imports(module) if target.startswith(oracles)], module


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_long(module):
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: more than one noun"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_no_folder_is_crowded(folder):
    if folder.split(".")[1:2] == ["cli"] or folder.removeprefix("moeflow.").split(".")[0] in FAMILIES:
        return
    path = FILES[folder].parent
    names = [one.name for one in path.iterdir() if one.name[0] != "_" and one.suffix != ".so"]
    if folder == "moeflow":  # rooms apart
        names = [name for name in names if not (path / name).is_dir()]
    assert len(names) <= MAX_NAMES, f"{folder} holds {len(names)} names: {sorted(names)}"


def light(code: str, heavy: tuple[str, ...]) -> None:
    """Assert that a program imports none of `heavy`."""
    code += f"\nimport sys; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip().endswith("[]"), run.stdout.splitlines()[-1]


def test_importing_moeflow_is_light():
    light("import moeflow", ("torch", "transformers", "numpy", "rich"))


def test_help_imports_neither_torch_nor_transformers():
    program = "import moeflow.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass"
    light(program, ("torch", "transformers", "numpy", "rich", "prompt_toolkit"))


def test_checkout_is_one_tree_even_beside_another_copy():
    """A sub-package must come from the checkout whose moeflow was imported."""
    code = "import moeflow.kernels.expert_mlp as e, moeflow; print(moeflow.__file__); print(e.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    package, kernel = map(Path, run.stdout.split())
    assert package.parent.parent == kernel.parent.parent == ROOT
