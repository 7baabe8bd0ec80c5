"""Rules of the package's layout. Each takes a `SourceTree` and yields one line for each thing that is wrong."""

import ast
import graphlib
import re
from collections.abc import Iterator
from typing import TypeGuard

from helpers.source_tree import ORDER, SIDE_PACKAGES, SourceTree

MAX_LINES = 350
# They write in place under a lock, or give a whole folder its name; tests kill them at each line.
WRITERS = {
    "moeflow.atomic_file",
    "moeflow.checkpoint.pack_journal",
    "moeflow.checkpoint.packed_writer",
    "moeflow.demo.model",
    "moeflow.demo.source",
    "moeflow.hf.gguf.folder",
    "moeflow.hub.partial_file",
    "moeflow.hub.stores",
    "moeflow.trace.writer",
}
MAX_NAMES = 16  # in a folder of moeflow/, but for the command line's
# Attributes that belong to transformers and may change with it.
PRIVATE = {
    "_apply_gate", "act_fn", "has_post_expert_norm", "post_expert_norm", "past_key_values", "_experts_implementation",
    "_attn_implementation", "_is_hf_initialized", "_supports_attention_backend", "get_seq_length",
}  # fmt: skip
_ORACLES = "moeflow.engine.regrouping.oracles"


def imports_are_of_earlier_rooms(tree: SourceTree) -> Iterator[str]:
    """A module imports only from its own room and from rooms earlier in the order."""
    for module in tree.files:
        if module == "moeflow":
            continue
        place = tree.place(module)
        if place is None:
            yield f"the room of {module} has no place in ORDER (tests/helpers/source_tree.py)"
            continue
        for target in sorted(tree.imports(module)):
            if target not in tree.files:
                yield f"{module} imports {target}, which is not there"
            elif tree.room(target) != tree.room(module) and (tree.place(target) or 0) >= place:
                yield f"{module} imports {target}, whose room is not earlier in the order"


def no_circle(tree: SourceTree) -> Iterator[str]:
    """No file imports itself by way of others."""
    graph = {module: tree.imports(module) for module in tree.files if module != "moeflow"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"imports in a circle: {' -> '.join(error.args[1])}"


def folders_are_listed(tree: SourceTree) -> Iterator[str]:
    """Pyproject lists every folder with Python files, in order, and no other."""
    listed = tree.setuptools["packages"]
    for folder in sorted(tree.folders - set(listed)):
        yield f"{folder} is left out of pyproject's packages, and so of the wheel"
    for folder in sorted(set(listed) - tree.folders):
        yield f"{folder} is in pyproject's packages and is not there"
    if listed != sorted(listed):
        yield "pyproject's packages are not sorted"
    if tree.setuptools["package-dir"] != {"moeflow": "moeflow", **{f"moeflow.{name}": name for name in SIDE_PACKAGES}}:
        yield "pyproject's package-dir does not name moeflow and its side packages"


def folders_have_signs(tree: SourceTree) -> Iterator[str]:
    """Each folder's sign says what lives there, what it knows nothing of and who imports it."""
    for folder in sorted(tree.folders):
        side = folder.removeprefix("moeflow.") in SIDE_PACKAGES
        sign = tree.sign(folder)
        if side and folder in tree.files:
            yield f"{folder} has an __init__.py: transformers' probe would take it for an installed library"
        elif not side and folder not in tree.files:
            yield f"{folder} has no __init__.py"
        elif not sign:
            yield f"{folder} has no {'README.md' if side else 'docstring in its __init__.py'}"
        elif folder != "moeflow" and "nothing" not in sign:
            yield f"the sign of {folder} does not say what it knows nothing of"
        elif folder != "moeflow" and not _importer_sentences(sign):
            yield f"the sign of {folder} does not say who imports it"


def signs_name_the_importers(tree: SourceTree) -> Iterator[str]:
    """A sign's sentences about imports name, as `room/`, the rooms that import the folder, and no others."""
    for folder in sorted(tree.folders - {"moeflow"}):
        sentences = _importer_sentences(tree.sign(folder) or "")
        named = set(re.findall(r"`(\w+)[/`]", sentences)) & {*ORDER, *SIDE_PACKAGES}
        importers = tree.importers(folder)
        for room in sorted(importers - named):
            yield f"{room} imports {folder}, whose sign does not name it"
        for room in sorted(named - importers):
            yield f"the sign of {folder} names {room}, which does not import it"


def _importer_sentences(sign: str) -> str:
    """Return a sign's sentences that say who imports the folder."""
    sentences = re.split(r"(?<=[.:])\s+|\n\n", sign)
    return " ".join(sentence for sentence in sentences if re.search(r"\bimports?\s+(it|them)\b", sentence))


def modules_have_docstrings(tree: SourceTree) -> Iterator[str]:
    """Each file says in its first line what lives in it."""
    for module, file in tree.files.items():
        if file.name != "__init__.py" and not ast.get_docstring(tree.syntax(module)):
            yield f"{module} has no docstring"


def no_room_is_hidden(tree: SourceTree) -> Iterator[str]:
    """No folder of moeflow/ has the name of a folder beside it, which would be found first."""
    beside = {path.name for path in tree.root.iterdir() if path.is_dir()} - {"moeflow"}
    for path in sorted((tree.root / "moeflow").iterdir()):
        if path.is_dir() and path.name[0] != "_" and path.name in beside:
            yield f"moeflow/{path.name} would be hidden by the folder {path.name} beside moeflow"


def only_hf_knows_transformers(tree: SourceTree) -> Iterator[str]:
    """Transformers' private attributes and inner modules appear in hf/ alone; what it exports every room may import."""
    for module in tree.files:
        if tree.room(module) in {"hf", *SIDE_PACKAGES}:  # the side packages never see a model
            continue
        for node in ast.walk(tree.syntax(module)):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
                yield f"{module}:{node.lineno} touches transformers' {node.attr}"
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if source.split(".")[0] == "transformers" and source not in {"transformers", "transformers.utils"}:
                yield f"{module} imports {source}"


def oracles_stay_on_their_shelf(tree: SourceTree) -> Iterator[str]:
    """Nothing in the package imports the oracles of regrouping."""
    for module in tree.files:
        if not module.startswith(_ORACLES):
            for target in sorted(tree.imports(module)):
                if target.startswith(_ORACLES):
                    yield f"{module} imports {target}"


def no_file_is_long(tree: SourceTree) -> Iterator[str]:
    """A file has at most `MAX_LINES` lines, tests and scripts included."""
    beside = [file for folder in ("tests", "scripts") for file in sorted((tree.root / folder).rglob("*.py"))]
    for file in [*tree.files.values(), *beside]:
        lines = len(file.read_text().splitlines())
        if lines > MAX_LINES:
            yield f"{file.relative_to(tree.root)} has {lines} lines: more than one noun"


def no_folder_is_crowded(tree: SourceTree) -> Iterator[str]:
    """A folder of moeflow/ holds at most `MAX_NAMES` names, rooms of the root apart."""
    for folder in sorted(tree.folders):
        if folder.split(".")[1:2] == ["cli"] or folder.removeprefix("moeflow.").split(".")[0] in SIDE_PACKAGES:
            continue
        path = tree.root.joinpath(*folder.split("."))
        names = [one.name for one in path.iterdir() if one.name[0] != "_" and one.suffix != ".so"]
        if folder == "moeflow":
            names = [name for name in names if not (path / name).is_dir()]
        if len(names) > MAX_NAMES:
            yield f"{folder} holds {len(names)} names: {sorted(names)}"


def files_are_written_through_one_door(tree: SourceTree) -> Iterator[str]:
    """Only `WRITERS` replace or rename files or write into them; the others take atomic_file."""
    for module in tree.files:
        for node in ast.walk(tree.syntax(module)):
            if module not in WRITERS and isinstance(node, ast.Call) and _writes(node):
                yield f"{module}:{node.lineno} writes a file itself: {ast.unparse(node)[:60]}"


def _writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in ("os.replace", "os.rename", "os.renames", "shutil.move", "shutil.copyfile", "NamedTemporaryFile"):
        return True
    if name.endswith((".write_text", ".write_bytes", ".rename")):
        return True
    if call.args and ast.unparse(call.args[0]) == "partial":  # what atomic_file gives
        return False
    modes = [value.value for value in [*call.args, *(word.value for word in call.keywords)] if _is_text(value)]
    return name in ("open", "os.fdopen") and any(set(mode) & set("wax+") and len(mode) < 4 for mode in modes)


def _is_text(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def functions_are_annotated(tree: SourceTree) -> Iterator[str]:
    """Functions that are not nested name the type of what they return; public ones those of all their arguments too."""
    for module in tree.files:
        waiting: list[tuple[str, ast.AST, bool]] = [(module, tree.syntax(module), True)]
        while waiting:
            owner, node, is_public = waiting.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef):
                    waiting.append((f"{owner}.{child.name}", child, is_public and not child.name.startswith("_")))
                elif isinstance(child, (ast.If, ast.Try)):
                    waiting.append((owner, child, is_public))
                elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    for missing in _unannotated(child, is_public, is_method=isinstance(node, ast.ClassDef)):
                        yield f"{owner}.{child.name} has no annotation of {missing}"


def _unannotated(function: ast.FunctionDef | ast.AsyncFunctionDef, in_public: bool, *, is_method: bool) -> list[str]:
    """List a public function's arguments that have no annotation, and any function's "return".

    Args:
        in_public: whether the function stands in a module or a public class.
        is_method: whether it has a first argument that needs no annotation, `self` or `cls`.
    """
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if any(
        decorator.partition("(")[0] == "triton.jit" for decorator in decorators
    ):  # Triton's language has no types of values
        return []
    missing = [] if function.returns else ["return"]
    if not in_public or (function.name.startswith("_") and not function.name.startswith("__")):
        return missing
    arguments = [*function.args.posonlyargs, *function.args.args]
    if is_method and "staticmethod" not in decorators:
        arguments = arguments[1:]
    arguments += [*function.args.kwonlyargs, *filter(None, (function.args.vararg, function.args.kwarg))]
    return [one.arg for one in arguments if one.annotation is None] + missing
