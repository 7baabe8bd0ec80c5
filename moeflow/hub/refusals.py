"""What a server's refusal means, and what to do about it: one line for each.

Knows status codes and the hub's error codes. Knows nothing of requests.
"""

from collections.abc import Mapping

from moeflow.errors import ModelSourceError
from moeflow.formatting import brief

_AGAIN = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524)


class RevisionGoneError(ModelSourceError):
    """The repository is there, the revision is not: no cached one is used in its place."""


class LostError(Exception):
    """A request failed in a way that the next may not.

    Args:
        reason: what happened.
        retry_after_s: how long the server asks to wait, where it does.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def is_passing(status: int) -> bool:
    """Tell whether a status says that a later request may succeed."""
    return status in _AGAIN


def lost(status: int, headers: Mapping[str, str]) -> LostError:
    """Return the error of a status that passes, with the wait that the server asks for.

    Args:
        status: of the response.
        headers: of the response.
    """
    reason = "the server allows no more requests for now (429)" if status == 429 else f"the server answers {status}"
    try:
        return LostError(reason, max(0.0, float(headers.get("Retry-After") or "")))
    except ValueError:  # none, or a date
        return LostError(reason)


def refusal(status: int, headers: Mapping[str, str], what: str, endpoint: str) -> ModelSourceError:
    """Return the error of a status that stays.

    Args:
        status: of the response.
        headers: of the response; the hub's own say more than the status.
        what: was asked for: a repository, or a file of it.
        endpoint: of the hub.
    """
    code, message = headers.get("X-Error-Code"), headers.get("X-Error-Message") or ""
    if code == "RevisionNotFound":
        return RevisionGoneError(
            f"{what} is not at {endpoint}: the repository is there, that revision is not. Give a branch, tag or commit "
            "that it has, or leave --revision out."
        )
    if code == "GatedRepo":
        return ModelSourceError(
            f"{what} is gated: its owner lets in who asks. Ask on its page at {endpoint}, and set HF_TOKEN to a token "
            "of the account that was let in."
        )
    if code == "EntryNotFound":
        return ModelSourceError(f"{what} is not at {endpoint}, though the repository lists it. Run it again.")
    if status == 401 and message.startswith("Invalid credentials"):
        return ModelSourceError(
            f"{what}: {endpoint} does not accept the token (401). Set HF_TOKEN to a valid one, or unset it."
        )
    if code == "RepoNotFound" or status in (401, 404):
        return ModelSourceError(
            f"{what} is not at {endpoint}, or it is private ({status}). Check the name; for a private one set HF_TOKEN "
            "to a token that may read it."
        )
    if status == 403:
        return ModelSourceError(
            f"{what}: {endpoint} does not let this token read it (403{f': {brief(message)}' if message else ''}). Set "
            "HF_TOKEN to one that may, or ask on its page."
        )
    if status == 429:
        return ModelSourceError(
            f"{what}: {endpoint} allows no more requests for now (429). Wait some minutes, or set HF_TOKEN: with a "
            "token it allows more."
        )
    if is_passing(status):
        return ModelSourceError(f"{what}: {endpoint} is out of order ({status}). Try again later.")
    return ModelSourceError(
        f"{what}: {endpoint} answers {status}{f' ({brief(message)})' if message else ''}. Check the name, and "
        "HF_ENDPOINT if it is set."
    )
