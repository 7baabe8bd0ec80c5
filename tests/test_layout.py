"""The house: imports of earlier rooms, no circle, every folder listed with a sign, one room that knows transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import layout_checks
from helpers.paths import ROOT
from helpers.source_tree import SIDE_PACKAGES, SourceTree

CHECKS = (
    layout_checks.imports_are_of_earlier_rooms,
    layout_checks.no_circle,
    layout_checks.folders_are_listed,
    layout_checks.folders_have_signs,
    layout_checks.signs_name_the_importers,
    layout_checks.modules_have_docstrings,
    layout_checks.no_room_is_hidden,
    layout_checks.only_hf_knows_transformers,
    layout_checks.oracles_stay_on_their_shelf,
    layout_checks.no_file_is_long,
    layout_checks.no_folder_is_crowded,
    layout_checks.files_are_written_through_one_door,
)


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return SourceTree(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_layout(check, tree):
    wrong = list(check(tree))
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the package's source files, to be broken."""
    for top in ("moeflow", *SIDE_PACKAGES):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c*", "*.h"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_folder_that_is_left_out_of_the_wheel_is_named(copied):
    folder = copied / "moeflow/gateway"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""HTTP. Knows nothing of experts. Only the command line imports it."""\n')
    assert [line for line in layout_checks.folders_are_listed(SourceTree(copied)) if "moeflow.gateway " in line]
    (folder / "app.py").write_text('"""The application."""\n')
    assert "the room of moeflow.gateway.app has no place" in "".join(
        layout_checks.imports_are_of_earlier_rooms(SourceTree(copied))
    )


def test_a_docstring_that_is_missing_is_named(copied):
    (copied / "moeflow/policy/__init__.py").write_text("")
    (copied / "moeflow/paths.py").write_text("import os\n")
    tree = SourceTree(copied)
    assert list(layout_checks.folders_have_signs(tree)) == ["moeflow.policy has no docstring in its __init__.py"]
    assert list(layout_checks.modules_have_docstrings(tree)) == ["moeflow.paths has no docstring"]


def test_an_importer_that_a_sign_leaves_out_or_makes_up_is_named(copied):
    with (copied / "moeflow/batch/run.py").open("a") as file:
        file.write("\n\ndef late():\n    from moeflow.kernels.cpu import ops\n")
    sign = copied / "moeflow/policy/__init__.py"
    sign.write_text(sign.read_text().replace("`replay/`", "`trace/`"))
    assert list(layout_checks.signs_name_the_importers(SourceTree(copied))) == [
        "batch imports moeflow.kernels.cpu, whose sign does not name it",
        "replay imports moeflow.policy, whose sign does not name it",
        "the sign of moeflow.policy names trace, which does not import it",
    ]


def test_an_import_of_a_later_room_is_named(copied):
    with (copied / "moeflow/policy/cache.py").open("a") as file:
        file.write("\n\ndef late():\n    from moeflow.offload import runtime\n")
    (line,) = layout_checks.imports_are_of_earlier_rooms(SourceTree(copied))
    assert line == "moeflow.policy.cache imports moeflow.offload.runtime, whose room is not earlier in the order"


def test_a_circle_is_named(copied):
    with (copied / "moeflow/errors.py").open("a") as file:
        file.write("\n\nimport moeflow.memory_size\n")
    (line,) = layout_checks.no_circle(SourceTree(copied))
    assert "moeflow.errors" in line
    assert "moeflow.memory_size" in line


def test_a_function_without_annotations_is_named(copied):
    code = """
def found(path, *, key: str) -> str:
    def hook(path): ...

def _hidden(path): ...

class Shelf:
    def __init__(self, path: str): ...
    def take(self, book: int): ...

class _Drawer:
    def open(self, key): ...
    def close(self, key) -> None: ...

@triton.jit
def kernel(rows): ...
"""
    (copied / "moeflow/paths.py").write_text(code)
    wrong = layout_checks.functions_are_annotated(SourceTree(copied))
    assert [line for line in wrong if line.startswith("moeflow.paths")] == [
        "moeflow.paths.found has no annotation of path",
        "moeflow.paths._hidden has no annotation of return",
        "moeflow.paths._Drawer.open has no annotation of return",
        "moeflow.paths.Shelf.__init__ has no annotation of return",
        "moeflow.paths.Shelf.take has no annotation of return",
    ]


def test_a_long_file_is_named_wherever_it_lies(copied):
    for name in ("moeflow/paths.py", "tests/test_long.py", "scripts/bench_long.py"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("pass\n" * (layout_checks.MAX_LINES + 1))
    assert list(layout_checks.no_file_is_long(SourceTree(copied))) == [
        f"{name} has 351 lines: more than one noun"
        for name in ("moeflow/paths.py", "tests/test_long.py", "scripts/bench_long.py")
    ]


def light(code: str, heavy: tuple[str, ...]) -> None:
    """Assert that a program imports none of `heavy`."""
    code += f"\nimport sys; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip().endswith("[]"), run.stdout.splitlines()[-1]


def test_importing_moeflow_is_light():
    light("import moeflow", ("torch", "transformers", "numpy", "rich", "matplotlib"))


def test_help_imports_neither_torch_nor_transformers():
    program = "import moeflow.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass"
    light(program, ("torch", "transformers", "numpy", "rich", "prompt_toolkit", "matplotlib"))


def test_checkout_is_one_tree_even_beside_another_copy():
    """A sub-package must come from the checkout whose moeflow was imported."""
    code = "import moeflow.kernels.quantization.formats as f, moeflow; print(moeflow.__file__); print(f.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    package, kernel = map(Path, run.stdout.split())
    assert package.parent.parent == kernel.parents[2] == ROOT
