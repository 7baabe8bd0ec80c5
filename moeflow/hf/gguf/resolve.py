"""GGUF files where users name a model: a file, one of its splits, or a folder that holds one or several.

Knows names of files, and the hub for a config of another repository. Knows nothing of what is in the files.
"""

from pathlib import Path
from typing import Any

from moeflow.checkpoint.gguf.names import ENDING, gguf_models, list_models
from moeflow.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.errors import ConfigError, ModelSourceError
from moeflow.hf.gguf.folder import gguf_folder
from moeflow.hub.download import fetch_model
from moeflow.hub.selection import find_gguf, sizes_in

_OF_CONFIG = ("token", "cache_dir", "local_files_only")  # options of a download that hold for another repository's too
_OWN = ("config.json", "tokenizer.json")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name."""
    return path.suffix.lower() == ENDING and path.is_file()


def gguf_folder_of(
    path: Path, gguf_file: str | None = None, config: str | Path | None = None, **hub_options: Any
) -> Path:
    """Return the model folder of a path: the path, or the folder of small files that stands for its GGUF file.

    Args:
        path: a GGUF file, or a folder.
        gguf_file: name of a GGUF file in the folder, or of any of its splits; None for the folder's own weights.
        config: a folder or a hub id whose config.json and tokenizer.json win over the file's metadata and over those
            beside it.
        **hub_options: of the download of `config`.

    Raises:
        ModelSourceError: a folder of several GGUF models, and none is chosen; no such file in it; no such config.
        ConfigError: `gguf_file` beside a path of a file, or of another type.
        CheckpointError, UnsupportedModelError: see `gguf_folder`.
    """
    if gguf_file is not None and (not isinstance(gguf_file, str) or not gguf_file):
        raise ConfigError(f"gguf_file is {gguf_file!r:.80}. Give the name of a GGUF file of the model.")
    file: Path | None = path
    if not path.is_dir():
        if gguf_file is not None:
            raise ConfigError(f"{path} is a file itself, and gguf_file chooses one of a folder. Leave gguf_file out.")
    elif gguf_file is not None:
        file = path / find_gguf(str(path), sizes_in(path), gguf_file)[0]
        if config is None and file.parent != path and any((path / name).is_file() for name in _OWN):
            config = path  # a repository with a folder for each quantisation
    else:
        file = _only_file(path)
    if file is None:
        return path
    return gguf_folder(file, config=None if config is None else _config_folder(config, hub_options))


def _only_file(folder: Path) -> Path | None:
    """Return the first file of a folder's only GGUF model; None where its weights are others, or none."""
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE, PACKED_FILE)):
        return None
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if is_gguf(file)}
    models = gguf_models(sizes)
    if len(models) > 1:
        raise ModelSourceError(
            f"{folder} holds {len(models)} GGUF models: {list_models(sizes)}. Choose one: gguf_file= of load_moe, "
            "--gguf-file of the command line."
        )
    return folder / next(iter(models)) if models else None


def _config_folder(config: str | Path, hub_options: dict[str, Any]) -> Path:
    """Return the folder of a config; from the hub, all but the weights is fetched."""
    folder = Path(config).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(config).startswith((".", "/", "~")) or str(config).count("/") > 1:
        raise ModelSourceError(f"config {config} is no folder. Give the folder of the model's own files, or a hub id.")
    options = {name: hub_options[name] for name in _OF_CONFIG if name in hub_options}
    try:
        return fetch_model(str(config), weights=False, **options).folder
    except ModelSourceError as error:
        raise ModelSourceError(f"config {config} is no folder here, and not from the hub: {error}") from error
