"""A model from the hub to the disk: what is there is used, what is missing is fetched, what was begun goes on.

Knows the order of the steps. Knows nothing of HTTP or of layouts.
"""

import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moeflow.atomic_file import cannot_write
from moeflow.checkpoint.gguf.names import ENDING
from moeflow.checkpoint.headers import INDEX_FILE
from moeflow.checkpoint.weight_index import read_weight_index
from moeflow.errors import ModelSourceError, MoeflowError
from moeflow.file_lock import exclusive
from moeflow.formatting import format_bytes
from moeflow.hub.partial_file import bytes_there, journal_of, name_in_journal
from moeflow.hub.patience import PATIENCE_S
from moeflow.hub.refusals import RevisionGoneError
from moeflow.hub.repository import Repository, RepositoryFile
from moeflow.hub.selection import WEIGHTS, find_gguf, refuse_others, select_files, sizes_in
from moeflow.hub.stores import CacheStore, FolderStore
from moeflow.hub.transfer import FileJob, Transfer
from moeflow.progress import ProgressCallback

_log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # for links, journals and what else writes to the disk


class Fetched(NamedTuple):
    """What a download did.

    Args:
        folder: holds the files, or links to them.
        commit: of the repository.
        num_files: in the folder.
        num_bytes: of those files.
        fetched_bytes: that came over the network in this run.
        seconds: that it took.
    """

    folder: Path
    commit: str
    num_files: int
    num_bytes: int
    fetched_bytes: int
    seconds: float


def download(
    id: str,
    to: str | Path | None = None,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    *,
    gguf_file: str | None = None,
) -> Path:
    """Fetch a model's files from the hub and return their folder.

    Args:
        id: on the hub: org/name.
        to: folder for the files; None for the hub's cache.
        revision: a branch, tag or commit; None for the default branch.
        progress: called with (bytes done, bytes in all).
        gguf_file: name of a GGUF file of the repository, or of one of its splits: of the weights it alone is fetched.

    Raises:
        ModelSourceError: see `fetch_model`.
    """
    return fetch_model(id, to, gguf_file=gguf_file, revision=revision, progress=progress).folder


def fetch_model(
    id: str,
    to: str | Path | None = None,
    *,
    gguf_file: str | None = None,
    weights: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    patience_s: float = PATIENCE_S,
    progress: ProgressCallback | None = None,
) -> Fetched:
    """Fetch what is missing of a model's files. A run that was ended goes on with the next one.

    Args:
        id: on the hub: org/name.
        to: folder for the files; None for the hub's cache.
        gguf_file: name of a GGUF file of the repository, or of one of its splits: of the weights it alone is fetched.
        weights: whether any are fetched; without them, all that is beside them.
        revision: a branch, tag or commit; None for the default branch.
        token: see `Repository`.
        cache_dir: the hub's cache; None for the user's own.
        local_files_only: whether nothing is asked of the network.
        force_download: whether files that are there are fetched again.
        patience_s: how long nothing may come before it gives up.
        progress: called with (bytes done, bytes in all) where something is fetched.

    Raises:
        ModelSourceError: no network, no such repository, revision or file, refused; no safetensors, and no GGUF file
            chosen; no room on the disk, or it cannot be written; the server sends other bytes than the repository
            lists. Nothing lies under a final name then that is not whole.
    """
    from huggingface_hub import constants

    begin_s = time.monotonic()
    store = CacheStore(id, cache_dir) if to is None else FolderStore(to)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    from_cache = partial(_from_cache, store, id, revision, gguf_file, weights)
    if offline:
        why = "local_files_only is set" if local_files_only else "HF_HUB_OFFLINE is set"
        return from_cache(f"{why}, so that the network is not asked")
    repository = Repository(id, revision, token, patience_s=patience_s)
    try:
        commit = repository.commit
    except RevisionGoneError:
        raise
    except ModelSourceError as error:
        if force_download or not isinstance(store, CacheStore) or store.cached(revision) is None:
            raise
        _log.warning("%s The model is taken from the cache.", error)
        return from_cache(str(error))
    files = select_files(repository, gguf_file, weights=weights)
    try:
        fetched = complete(store, repository, files, force_download, progress)
        folder = store.finish(files, commit, revision)
    except OSError as error:
        raise ModelSourceError(cannot_write(error.filename or store.folder, error)) from error
    num_bytes = sum(file.size for file in files)
    return Fetched(folder, commit, len(files), num_bytes, fetched, time.monotonic() - begin_s)


def complete(
    store: CacheStore | FolderStore,
    repository: Repository,
    files: list[RepositoryFile],
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> int:
    """Fetch the files that a store lacks, while no other process does; return how many bytes came.

    Args:
        store: where they go.
        repository: they are of it.
        files: that are wanted.
        force: whether those that are there are fetched, too.
        progress: called with (bytes done, bytes in all) where something is fetched.

    Raises:
        ModelSourceError: one cannot be had, or there is no room.
        OSError: the disk cannot be written.
    """
    commit = repository.commit
    if not force and all(store.has(file, commit) for file in files):
        return 0  # a cache that is only read, too
    store.lock.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(
        store.lock, on_taken=lambda: _log.warning("another process fetches %s: waiting for it.", repository.id)
    ):
        # The weights come last: a config that cannot be used is seen before.
        missing = [file for file in files if force or not store.has(file, commit)]
        missing.sort(key=lambda file: (file.name.endswith(WEIGHTS), file.name))
        if not missing:
            return 0
        _drop_old_partials(store.partials, files)
        _check_room(store, repository, missing, force)
        _log.info("fetching %s of %s", format_bytes(sum(file.size for file in missing)), repository.what)
        once = {store.target(file): file for file in missing}  # two names may have one content
        jobs = [FileJob(file, store.partials, target, fresh=force) for target, file in once.items()]
        there_bytes = sum(file.size for file in files) - sum(job.file.size for job in jobs)
        transfer = Transfer(repository, jobs, progress, there_bytes)
        transfer.run()
        return transfer.fetched_bytes


def _drop_old_partials(partials: Path, files: list[RepositoryFile]) -> None:
    """Remove what earlier runs began of files that have another content now, and say so."""
    etags = {file.name: file.etag for file in files}
    for journal in partials.glob("*.journal"):
        name = name_in_journal(journal)
        if name in etags and journal.stem != etags[name]:
            _log.warning("%s has other content in this revision than when it was begun: it begins again.", name)
            journal.with_suffix(".partial").unlink(missing_ok=True)
            journal.unlink()
    for left in partials.glob("*.partial"):
        if not journal_of(left).is_file():
            left.unlink()


def _check_room(
    store: CacheStore | FolderStore, repository: Repository, missing: list[RepositoryFile], force: bool
) -> None:
    there = 0 if force else sum(bytes_there(store.partials, file) for file in missing)
    need = sum(file.size for file in missing) - there + SPARE_BYTES
    free = shutil.disk_usage(store.lock.parent).free
    if need > free:
        raise ModelSourceError(
            f"{repository.what} needs {format_bytes(need)} more in {store.folder}, and {format_bytes(free)} are free. "
            "Make room, or give a folder on another disk: --to FOLDER, or HF_HOME for the cache."
        )
    copied = sum(file.size for file in missing if file.name.endswith(".safetensors"))
    if need + copied > free:
        _log.warning(
            "%s will be free when %s is here: not enough for a packed or quantised copy of all of it beside it (up to "
            "%s). moeflow download %s --quantize int4 --to FOLDER holds no more than a few shards at a time.",
            format_bytes(free - need), repository.what, format_bytes(copied), repository.id,
        )  # fmt: skip


def _from_cache(
    store: CacheStore | FolderStore, id: str, revision: str | None, gguf_file: str | None, weights: bool, why: str
) -> Fetched:
    """Return the cache's folder for a revision, where it lacks no file of the weights."""
    found = store.cached(revision) if isinstance(store, CacheStore) else None
    what = id if revision is None else f"{id} at revision {revision}"
    if found is None:
        raise ModelSourceError(
            f"{what} is not in the hub's cache, and {why}. Fetch it where there is a network: moeflow download {id}."
        )
    folder, commit = found
    sizes = sizes_in(folder)
    if gguf_file is not None:
        try:
            find_gguf(f"{what} in the hub's cache", sizes, gguf_file)
        except ModelSourceError as error:
            raise ModelSourceError(
                f"{error} No other can be fetched now ({why}): moeflow download {id} --gguf-file NAME, where there is "
                "a network."
            ) from None
    elif weights and (folder / INDEX_FILE).is_file():
        try:
            shards = read_weight_index(folder / INDEX_FILE).shards
        except MoeflowError:
            shards = []  # told when it is loaded
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelSourceError(
                f"{what} lacks {len(missing)} of {len(shards)} shards in the hub's cache, and {why}. Fetch the rest "
                f"where there is a network: moeflow download {id}."
            )
    elif weights and not any(name.endswith(WEIGHTS) and not name.endswith(ENDING) for name in sizes):
        refuse_others(f"{what} in the hub's cache", sizes)
    return Fetched(folder, commit, len(sizes), sum(sizes.values()), 0, 0.0)
