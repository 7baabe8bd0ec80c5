"""Every check of a model's files, and the trial.

Knows the checks, and what of them is left where one fails. Knows nothing of how they look.
"""

import threading
from pathlib import Path
from typing import Any

from moeflow.doctor.finding import BROKEN, Finding, works
from moeflow.doctor.model.gguf import check_gguf
from moeflow.doctor.model.packed import check_packed, packed_bytes
from moeflow.doctor.model.shards import check_shards, check_values
from moeflow.doctor.model.tokenizer import check_tokenizer
from moeflow.doctor.model.trial import check_trial
from moeflow.errors import MoeflowError
from moeflow.hf.model_folder import ModelFolder
from moeflow.progress import ShareCallback

_READING = 0.9  # of the progress


def check_model(folder: Path, progress: ShareCallback) -> list[Finding]:
    """Read all of a model, and try it. Every fault is told; memory is bounded by the largest expert and a few pieces.

    Args:
        folder: of the model.
        progress: called with the share done and what goes on.

    Returns:
        What was found, in the order of the checks.
    """
    found: list[Finding] = []
    config = _check_config(folder, found)
    shards = check_gguf(folder, found) or check_shards(folder, found)
    count = _Count(shards.num_bytes + packed_bytes(folder), progress)
    check_values(shards, found, count.add)
    if packed_bytes(folder):
        check_packed(folder, found, count.add)
    progress(_READING, "the tokenizer")
    vocab_size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    tokenizer = check_tokenizer(folder, vocab_size, found)
    progress(_READING, "16 tokens")
    if works(one for one in found if one.name not in ("tokenizer", "chat template", "values", "packed expert")):
        check_trial(folder, tokenizer, found)
    progress(1.0, "done")
    return found


def _check_config(folder: Path, found: list[Finding]) -> Any:
    """Read config.json, and build the model that it describes without weights; return the config, None without one."""
    model = ModelFolder(folder)
    try:
        config = model.config
    except MoeflowError as error:
        found.append(Finding("config", "config.json", BROKEN, str(error), "download it again"))
        return None
    found.append(Finding("config", f"{config.model_type}, {type(config).__name__}"))
    return config


class _Count:
    """Bytes read by several threads, told as a share."""

    def __init__(self, all_bytes: int, progress: ShareCallback) -> None:
        self._all, self._done, self._progress, self._lock = max(all_bytes, 1), 0, progress, threading.Lock()

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._done += num_bytes
            self._progress(_READING * min(self._done / self._all, 1.0), "reading every tensor")
