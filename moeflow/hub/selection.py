"""Which of a repository's files make a model: safetensors with all beside them, or one GGUF file of several.

Knows names and sizes. Knows nothing of how files come.
"""

from collections.abc import Mapping
from pathlib import Path

from moeflow.checkpoint.gguf.names import ENDING, list_models, split_names
from moeflow.errors import ModelSourceError
from moeflow.formatting import brief
from moeflow.hub.repository import Repository, RepositoryFile

_READ = (".safetensors", ".moeflow")
WEIGHTS = (*_READ, ENDING)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack")


def select_files(repository: Repository, gguf_file: str | None, *, weights: bool) -> list[RepositoryFile]:
    """Return the files that a model needs.

    Args:
        repository: of the model.
        gguf_file: name of the GGUF file that holds the weights, or of any of its splits; None for safetensors.
        weights: whether the weights are needed; without them, all that is beside them.

    Raises:
        ModelSourceError: no such file, or no weights that are read.
    """
    wanted = repository.wanted_files
    if gguf_file is None and weights:
        if not any(file.name.endswith(_READ) for file in wanted):
            refuse_others(repository.what, {file.name: file.size for file in repository.files})
        return wanted
    small = [file for file in wanted if not file.name.endswith(WEIGHTS)]
    if gguf_file is None:
        return small
    named = {file.name: file for file in repository.files}
    sizes = {name: file.size for name, file in named.items()}
    return small + [named[name] for name in find_gguf(repository.what, sizes, gguf_file)]


def find_gguf(what: str, sizes: Mapping[str, int], gguf_file: str) -> list[str]:
    """Return the names of all files of a GGUF model.

    Args:
        what: has the files, for messages.
        sizes: {name of a file: its bytes}.
        gguf_file: name of one of them.

    Raises:
        ModelSourceError: there is no such file, or a split of it is missing.
    """
    names = split_names(gguf_file) if gguf_file in sizes and gguf_file.lower().endswith(ENDING) else []
    if not names:
        found = list_models(sizes)
        raise ModelSourceError(
            f"{what} has no GGUF file {brief(gguf_file)!r}. "
            + (f"It has {found}: give one of these names." if found else "It has none at all: leave gguf_file out.")
        )
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ModelSourceError(
            f"{what} lacks {len(missing)} of {len(names)} splits of {brief(gguf_file)}, the first is "
            f"{brief(missing[0])}. Take another file of the model."
        )
    return names


def refuse_others(what: str, sizes: Mapping[str, int]) -> None:
    """Refuse files without safetensors among which are other weights.

    Args:
        what: has the files, for messages.
        sizes: {name of a file: its bytes}.

    Raises:
        ModelSourceError: it lists the GGUF files, or names one that is not read.
    """
    if found := list_models(sizes):
        raise ModelSourceError(
            f"{what} has no safetensors weights, but GGUF files: {found}. Choose one, the largest is the most exact: "
            "gguf_file= of load_moe, --gguf-file of the command line."
        )
    other = sorted(name for name in sizes if name.endswith(_OTHER_WEIGHTS))
    if other:
        raise ModelSourceError(
            f"{what} has no safetensors weights, only others ({brief(other[0])}). Take a repository that has them, or "
            "convert it once where you trust it."
        )


def sizes_in(folder: Path) -> dict[str, int]:
    """Return the files of a folder as a repository lists them: {name: bytes}."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
