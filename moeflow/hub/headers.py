"""Headers of a checkpoint at the hub: the tables that `open_checkpoint` gives for a folder, by ranges of the shards.

Knows the layout of safetensors files and the repository. Knows nothing of models.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from moeflow.atomic_file import write_atomically
from moeflow.checkpoint.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    header_entries,
    header_length,
    joined_headers,
)
from moeflow.checkpoint.weight_index import WeightIndex, read_weight_index
from moeflow.errors import CheckpointError
from moeflow.formatting import brief
from moeflow.hub.repository import Repository, RepositoryFile

_REQUESTS = 8  # in flight
_GUESS_BYTES = 64 << 10  # of a header with the 8 bytes before it
_ENTRY_BYTES = 110  # of a tensor in a header, beside its name
_SMALL_BYTES = 4 << 20  # tokenizers may be larger, and sizes need none
_WEIGHTS = (".safetensors", ".moeflow")

Given = TypeVar("Given")
Found = TypeVar("Found")


def remote_checkpoint(repository: Repository, folder: Path | None = None, heads: Path | None = None) -> Checkpoint:
    """Read the headers of a repository's shards.

    Args:
        repository: on the hub.
        folder: holds all files beside the weights. None: they are fetched into a temporary folder, the index, the
            configs and what else has at most 4 MB; it lives as long as the repository.
        heads: folder that keeps the headers: those that are there are not fetched again.

    Returns:
        Its tables, as `open_checkpoint` gives them for the folder; the shards in `files` are not there, and `stamps` is
        empty.

    Raises:
        ModelSourceError: see `Repository.files`.
        CheckpointError: no safetensors weights, or a shard is missing, truncated or corrupt.
    """
    files = {file.name: file for file in repository.wanted_files}
    folder = folder or _fetch_small(repository)
    index = WeightIndex([SINGLE_FILE], {}, None)
    if SINGLE_FILE not in files:
        if INDEX_FILE not in files:
            raise CheckpointError(
                f"{repository.what} has neither {SINGLE_FILE} nor {INDEX_FILE}. Give a repository with safetensors "
                "weights."
            )
        index = read_weight_index(folder / INDEX_FILE)
    missing = [shard for shard in index.shards if shard not in files]
    if missing:
        raise CheckpointError(
            f"{repository.what}: {len(missing)} of {len(index.shards)} shards are not in the repository, the first is "
            f"{brief(missing[0])}. Take another revision."
        )
    guesses = dict.fromkeys(index.shards, 8)
    for tensor, shard in index.weight_map.items():
        guesses[shard] += len(tensor) + _ENTRY_BYTES
    shards = [(files[shard], guesses[shard]) for shard in index.shards]
    found = _at_once(lambda shard: _head(repository, *shard, heads), shards)
    entries = (
        header_entries(_what(repository, file), head[8:], file.size, number)
        for number, ((file, _), head) in enumerate(zip(shards, found, strict=True))
    )
    return joined_headers(folder, index, entries, [])


def head_file(heads: Path, file: RepositoryFile) -> Path:
    """Return where the header of a shard is kept, with the 8 bytes before it.

    Args:
        heads: folder that keeps the headers.
        file: the shard.
    """
    return heads / f"{file.etag}.head"


def _fetch_small(repository: Repository) -> Path:
    """Fetch the index, the configs and what else is small into a folder that lives as long as the repository."""
    files = {file.name: file for file in repository.wanted_files}
    folder = Path(tempfile.mkdtemp(prefix="moeflow-hub-"))
    weakref.finalize(repository, shutil.rmtree, folder, ignore_errors=True)
    small = [
        file
        for file in files.values()
        if not file.name.endswith(_WEIGHTS) and (file.size <= _SMALL_BYTES or file.name == INDEX_FILE)
    ]
    small.sort(key=lambda file: -file.size)
    contents = _at_once(lambda file: repository.read(file.name, 0, file.size), small)
    for file, content in zip(small, contents, strict=True):
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file.name, content)
    return folder


def _head(repository: Repository, file: RepositoryFile, guess: int, heads: Path | None) -> bytes:
    """Read a shard up to the end of its header: in one request where it is not longer than guessed."""
    kept = None if heads is None else head_file(heads, file)
    if kept is not None and kept.is_file():
        return kept.read_bytes()
    text = repository.read(file.name, 0, max(guess, _GUESS_BYTES))
    end = 8 + header_length(_what(repository, file), text[:8], file.size)
    if end > len(text):
        text += repository.read(file.name, len(text), end - len(text))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, text[:end])
    return text[:end]


def _what(repository: Repository, file: RepositoryFile) -> Path:
    """Return what errors call a shard."""
    return Path(f"{repository.id}/{file.name}")


def _at_once(call: Callable[[Given], Found], given: list[Given]) -> Iterable[Found]:
    """Yield what calls return, in order; some are in flight at once, and the first error ends them."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        futures = [pool.submit(call, one) for one in given]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
