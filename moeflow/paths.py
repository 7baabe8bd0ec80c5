"""Where moeflow keeps what it makes for the user: the demo model, what was typed in the chat."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder, which may not exist yet.

    It is MOEFLOW_CACHE where that is set and not empty, else XDG_CACHE_HOME/moeflow, else ~/.cache/moeflow.
    """
    cache = os.environ.get("MOEFLOW_CACHE")
    if not cache:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moeflow"
    return Path(cache).expanduser()
