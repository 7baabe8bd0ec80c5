"""The user's cache folder, where moeflow keeps the demo model and the chat's history."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder, which may not exist yet.

    It is MOEFLOW_CACHE where that is set and not empty, else XDG_CACHE_HOME/moeflow, else ~/.cache/moeflow.
    """
    chosen = os.environ.get("MOEFLOW_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moeflow"
    return folder.expanduser()
