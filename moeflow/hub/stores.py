"""Where files of a repository go: the hub's cache, as huggingface_hub and transformers read it, or a plain folder.

Knows the layouts of both. Knows nothing of how files come.
"""

import json
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from moeflow.atomic_file import write_atomically
from moeflow.errors import ModelSourceError
from moeflow.hub.partial_file import new_digest
from moeflow.hub.repository import RepositoryFile

_READ_BYTES = 1 << 20


class CacheStore:
    """The hub's cache: blobs by their checksums, and a folder of links for each commit.

    Args:
        id: of the repository.
        cache_dir: the cache; None for the user's own (HF_HUB_CACHE, HF_HOME).
    """

    def __init__(self, id: str, cache_dir: str | Path | None = None) -> None:
        from huggingface_hub import constants

        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        name = f"models--{id.replace('/', '--')}"
        self.folder = cache / name
        self.partials = self.folder / "blobs"
        self.lock = cache / ".locks" / name / "moeflow.lock"

    def has(self, file: RepositoryFile, commit: str) -> bool:
        """Tell whether a file is there: its blob, or where the file system has no links the file itself."""
        return any(_size(path) == file.size for path in (self.target(file), self._link(file, commit)))

    def target(self, file: RepositoryFile) -> Path:
        """Return where a file goes."""
        return self.partials / file.etag

    def finish(self, files: list[RepositoryFile], commit: str, revision: str | None) -> Path:
        """Link the files of a commit, which are all there, and note that the revision is at it.

        Args:
            files: of the commit.
            commit: of the repository.
            revision: that was asked for; None for the default branch.

        Returns:
            The folder of links.

        Raises:
            OSError: the cache cannot be written.
        """
        for file in files:
            link, blob = self._link(file, commit), self.target(file)
            if blob.is_file() and not (link.exists() and link.samefile(blob)):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                try:
                    link.symlink_to(os.path.relpath(blob, link.parent))
                except OSError:  # a file system without links: as huggingface_hub does
                    os.replace(blob, link)
        ref = self._ref(revision)
        if revision != commit and (not ref.is_file() or ref.read_text() != commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(ref, commit, None)
        return self.snapshot(commit)

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit's files."""
        return self.folder / "snapshots" / commit

    def cached(self, revision: str | None) -> tuple[Path, str] | None:
        """Return folder and commit that the cache has for a revision, without asking the hub."""
        found = revision or "main"
        with suppress(OSError, ValueError):
            found = self._ref(revision).read_text().strip()
        if PurePosixPath(found).name != found or not self.snapshot(found).is_dir():
            return None
        return self.snapshot(found), found

    def _ref(self, revision: str | None) -> Path:
        parts = PurePosixPath(revision or "main")
        if parts.is_absolute() or ".." in parts.parts:
            raise ModelSourceError(f"{revision!r:.200} is no revision. Give a branch, a tag or a commit.")
        return self.folder / "refs" / parts

    def _link(self, file: RepositoryFile, commit: str) -> Path:
        return self.snapshot(commit) / file.name


class FolderStore:
    """A plain folder. What was checked stands in a record, so that the next run need not read it again.

    Args:
        folder: the files go there by their names in the repository.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.partials = self.folder / ".moeflow-download"
        self.lock = self.partials / "lock"
        self._record = self.partials / "checked.json"
        self._read: dict[tuple[object, ...], bool] = {}  # whether a file's bytes were right, by name and stamp

    def has(self, file: RepositoryFile, commit: str) -> bool:
        """Tell whether a file is there: as the record has it, or else by its checksum."""
        path = self.target(file)
        return _size(path) == file.size and (
            self._records().get(file.name) == _stamp(path, file) or self._is_intact(path, file)
        )

    def target(self, file: RepositoryFile) -> Path:
        """Return where a file goes."""
        return self.folder / file.name

    def finish(self, files: list[RepositoryFile], commit: str, revision: str | None) -> Path:
        """Note that the files, which are all there, were checked.

        Args:
            files: of the repository.
            commit: of the repository.
            revision: that was asked for; None for the default branch.

        Raises:
            OSError: the folder cannot be written.
        """
        record = {file.name: _stamp(self.target(file), file) for file in files}
        if record != self._records():
            self.partials.mkdir(parents=True, exist_ok=True)
            write_atomically(self._record, json.dumps(record, indent=1), None)
        return self.folder

    def _is_intact(self, path: Path, file: RepositoryFile) -> bool:
        key = (file.name, *_stamp(path, file))
        if key not in self._read:
            self._read[key] = _is_intact(path, file)
        return self._read[key]

    def _records(self) -> dict[str, list[object]]:
        try:
            found = json.loads(self._record.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _stamp(path: Path, file: RepositoryFile) -> list[object]:
    return [file.etag, file.size, path.stat().st_mtime_ns]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _is_intact(path: Path, file: RepositoryFile) -> bool:
    digest = new_digest(file)
    with open(path, "rb") as handle:
        while data := handle.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest() == (file.sha256 or file.etag)
