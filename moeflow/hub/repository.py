"""A repository of the hub at one commit: its files with sizes and checksums, and ranges of their bytes.

Knows the hub's API through huggingface_hub. Knows nothing of folders or of what files hold.
"""

import re
import threading
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from moeflow import __version__
from moeflow.errors import ModelSourceError
from moeflow.formatting import brief
from moeflow.hub.client import HubClient
from moeflow.hub.patience import PATIENCE_S, Patience
from moeflow.hub.refusals import LostError, is_passing, lost, refusal
from moeflow.hub.remote_file import ChangedError, RemoteFile

_WANTED = ["*.json", "*.safetensors", "*.moeflow", "*.jinja", "*.model", "*.txt", "*.py"]
_UNWANTED = ["original/*", "consolidated*"]
_ASK_S = 20.0  # patience for the list of files: nothing has been fetched yet


class RepositoryFile(NamedTuple):
    """A file of a repository.

    Args:
        name: relative to the repository, with slashes.
        size: in bytes.
        sha256: of its bytes, where it is stored with LFS.
        etag: its name in the hub's cache: the sha256, or the SHA-1 that git gives it.
    """

    name: str
    size: int
    sha256: str | None
    etag: str


class Repository:
    """A model's repository. Nothing is asked for before it is needed.

    Args:
        id: on the hub: org/name.
        revision: a branch, tag or commit; None for the default branch.
        token: sent to the hub alone; None or True for the user's own (HF_TOKEN, or what `hf auth login` stored), False
            for none.
        endpoint: URL of the hub; None for HF_ENDPOINT, or else the hub's own.
        patience_s: how long nothing may come before a fetch gives up.
    """

    def __init__(
        self,
        id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        from huggingface_hub import constants, get_token

        self.id, self.revision = id, revision
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token if isinstance(token, str) else None if token is False else get_token()
        self._patience_s = patience_s
        self.client = HubClient(self.endpoint, self._token, f"moeflow/{__version__}")

    @property
    def what(self) -> str:
        """The repository's name, with the revision where one was asked for."""
        return self.id if self.revision is None else f"{self.id} at revision {self.revision}"

    @property
    def commit(self) -> str:
        """The commit that the revision is at.

        Raises:
            ModelSourceError: see `files`.
        """
        return self._listing[0]

    @property
    def files(self) -> list[RepositoryFile]:
        """All files.

        Raises:
            ModelSourceError: no network, no such repository, a revision that is gone, gated, a rate limit, a list that
                cannot be.
        """
        return self._listing[1]

    @property
    def wanted_files(self) -> list[RepositoryFile]:
        """The files that a model needs: weights in safetensors, configs, tokenizer, template, Python.

        Raises:
            ModelSourceError: see `files`.
        """
        from huggingface_hub.utils import filter_repo_objects

        named = {file.name: file for file in self.files}
        found = filter_repo_objects(named, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        return [named[name] for name in found]

    def remote(self, file: RepositoryFile, stop: threading.Event | None = None) -> RemoteFile:
        """Return a file at its server.

        Args:
            file: one of `files`.
            stop: ends its reads; None where nothing does.
        """
        url = f"{self.endpoint}/{self.id}/resolve/{self.commit}/{quote(file.name)}"
        what = f"{file.name} of {self.id}"
        return RemoteFile(self.client, url, what, file.size, file.sha256, self._patience_s, stop or threading.Event())

    def read(self, name: str, begin: int, length: int) -> bytes:
        """Read bytes of a file.

        Args:
            name: of one of `files`.
            begin: the first byte.
            length: in bytes; fewer come where the file ends before.

        Raises:
            ModelSourceError: no such file, it is refused, or no network.
        """
        file = next((file for file in self.files if file.name == name), None)
        if file is None:
            raise ModelSourceError(f"{self.id} has no file {brief(name)!r}. Check the name.")
        parts: list[bytes] = []
        try:
            end = min(file.size, begin + length)
            self.remote(file).read(begin, end, lambda _, data: parts.append(data), whole=True)
        except ChangedError as error:
            raise ModelSourceError(f"{error}. Run it again, or set HF_ENDPOINT to another mirror.") from None
        return b"".join(parts)

    @cached_property
    def _listing(self) -> tuple[str, list[RepositoryFile]]:
        info = self._ask()
        siblings, commit = info.siblings, info.sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit) or siblings is None:
            raise ModelSourceError(f"{self.endpoint} lists no files of {self.what}. Check HF_ENDPOINT.")
        return commit, [self._file(sibling) for sibling in siblings]

    def _file(self, sibling: Any) -> RepositoryFile:
        name, lfs = sibling.rfilename, sibling.lfs
        path = PurePosixPath(name)
        if path.is_absolute() or {"..", ".git"} & set(path.parts) or "\\" in name or not name.isprintable() or not name:
            raise ModelSourceError(
                f"{self.what} lists the file {brief(name)!r}, which lies outside the repository. Do not use a hub that "
                "you do not trust: check HF_ENDPOINT."
            )
        sha256 = lfs.sha256 if lfs is not None else None
        size = lfs.size if lfs is not None else sibling.size
        etag = sha256 or sibling.blob_id
        if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag or ""):
            raise ModelSourceError(
                f"{self.endpoint} does not tell the size and checksum of {brief(name)!r} of {self.what}. Set "
                "HF_ENDPOINT to a hub that does."
            )
        return RepositoryFile(name, size, sha256, etag)

    def _ask(self) -> Any:
        """Return what the hub's API says of the repository, asked again where it is out of order."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        api = HfApi(endpoint=self.endpoint, token=self._token or False)
        patience = Patience(self.what, min(_ASK_S, self._patience_s), threading.Event())
        while True:
            try:
                return api.model_info(self.id, revision=self.revision, files_metadata=True, timeout=10)
            except HFValidationError as error:
                raise ModelSourceError(
                    f"{brief(self.id)!r} is no folder here, and no id of the hub ({brief(error)}). Give a folder, or "
                    "an id: org/name."
                ) from None
            except OfflineModeIsEnabled as error:
                raise ModelSourceError(
                    f"{self.what} is not asked for: HF_HUB_OFFLINE is set. Unset it to use the network."
                ) from error
            except HfHubHTTPError as error:
                status, headers = error.response.status_code, error.response.headers
                if not is_passing(status):
                    raise refusal(status, headers, self.what, self.endpoint) from None
                again, said = lost(status, headers), refusal(status, headers, self.what, self.endpoint)
            except Exception as error:  # of the HTTP library that this huggingface_hub uses
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                again = LostError(reason)
                said = ModelSourceError(
                    f"{self.what} could not be looked up at {self.endpoint} ({brief(reason)}). Check the network, "
                    "HF_ENDPOINT and proxies, or give a folder."
                )
            try:
                patience.wait(again)
            except ModelSourceError:
                raise said from again
