"""Where a model's headers come from: a folder, a copy of the hub's on this machine, or the hub itself.

Knows places. Knows nothing of sizes or speeds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.fit.sizes import ModelSizes, sizes_of
from moeflow.paths import cache_folder


@contextmanager
def model_source(model: str | Path, tell: Callable[[str], None]) -> Iterator[tuple[ModelSizes, Path]]:
    """Yield a model's sizes, and the folder whose disk it would be read from.

    Args:
        model: a folder, a GGUF file or a hub id; of an id, headers and small files are fetched, and are gone
            afterwards.
        tell: called before something that takes long.

    Raises:
        ModelSourceError: neither, or the hub does not give it; the message says why.
    """
    folder = Path(model)
    if _has_gguf(folder):
        from moeflow.hf.model_folder import ModelFolder  # its metadata become a config of transformers

        found = ModelFolder(folder)
        yield sizes_of(found.path, found.checkpoint), found.expert_files[0].parent
        return
    if folder.is_dir() or not _may_be_id(str(model)):
        yield sizes_of(folder), folder
        return
    from moeflow.hub.headers import remote_checkpoint
    from moeflow.hub.repository import Repository

    tell(f"reading the headers of {model} from the hub")
    repository = Repository(str(model))
    checkpoint = remote_checkpoint(repository)
    yield sizes_of(checkpoint.folder, checkpoint), cache_folder()


def _has_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder that may stand for one."""
    if path.is_dir():
        return (path / GGUF_FILE).is_file() or any(path.glob("*.gguf"))
    return path.suffix.lower() == ".gguf" and path.is_file()


def _may_be_id(text: str) -> bool:
    """Whether a text could name a model of the hub."""
    return text.count("/") <= 1 and text[:1] not in (".", "/", "~", "") and "\\" not in text
