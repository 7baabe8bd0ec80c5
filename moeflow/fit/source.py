"""Where a model's headers come from: a folder, a copy of the hub's on this machine, or the hub itself.

Knows places. Knows nothing of sizes or speeds.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.fit.sizes import ModelSizes, sizes_of
from moeflow.paths import cache_folder

if TYPE_CHECKING:
    from moeflow.hub.repository import Repository


@contextmanager
def model_source(
    model: str | Path, tell: Callable[[str], None], gguf_file: str | None = None
) -> Iterator[tuple[ModelSizes, Path]]:
    """Yield a model's sizes, and the folder whose disk it would be read from.

    Args:
        model: a folder, a GGUF file or a hub id; of an id, headers and small files are fetched, and are gone
            afterwards.
        tell: called before something that takes long.
        gguf_file: name of the GGUF file to take, of a hub id or of a folder with several.

    Raises:
        ModelSourceError: neither, or the hub does not give it; the message says why.
    """
    folder = Path(model)
    if _has_gguf(folder) or (gguf_file is not None and folder.is_dir()):
        from moeflow.hf.model_folder import ModelFolder  # its metadata become a config of transformers

        found = ModelFolder(folder, gguf_file=gguf_file)
        yield sizes_of(found.path, found.checkpoint), found.expert_files[0].parent
        return
    if folder.is_dir() or not _may_be_id(str(model)):
        yield sizes_of(folder), folder
        return
    from moeflow.hub.headers import remote_checkpoint
    from moeflow.hub.repository import Repository

    tell(f"reading the headers of {model} from the hub")
    repository = Repository(str(model))
    if gguf_file is not None:
        yield _remote_gguf(repository, gguf_file), cache_folder()
        return
    checkpoint = remote_checkpoint(repository)
    yield sizes_of(checkpoint.folder, checkpoint), cache_folder()


def _remote_gguf(repository: "Repository", gguf_file: str) -> ModelSizes:
    """Return the sizes of a GGUF file of the hub, by its headers alone; nothing of it stays."""
    from moeflow.hf.model_folder import ModelFolder
    from moeflow.hub.gguf_headers import read_remote_gguf

    def read(file: Path) -> ModelSizes:
        found = ModelFolder(file)
        try:
            return sizes_of(found.path, found.checkpoint)
        finally:
            shutil.rmtree(found.path, ignore_errors=True)  # stands for a file that goes

    with tempfile.TemporaryDirectory(prefix="moeflow-hub-") as folder:
        return read_remote_gguf(repository, gguf_file, Path(folder), read)


def _has_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder that may stand for one."""
    if path.is_dir():
        return (path / GGUF_FILE).is_file() or any(path.glob("*.gguf"))
    return path.suffix.lower() == ".gguf" and path.is_file()


def _may_be_id(text: str) -> bool:
    """Whether a text could name a model of the hub."""
    return text.count("/") <= 1 and text[:1] not in (".", "/", "~", "") and "\\" not in text
