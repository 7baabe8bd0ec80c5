"""Loads a model and records on a text what a conversion learns from."""

from collections.abc import Callable
from pathlib import Path

from moeflow.calibration.expert_inputs import ExpertInputs, record_inputs
from moeflow.calibration.windows import cut_windows
from moeflow.hf import pretrained
from moeflow.loading.load_moe import load_moe


def record_text(
    model: str | Path,
    text: str | None = None,
    *,
    num_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertInputs:
    """Load a model with its experts offloaded and record what they see on a text.

    Args:
        model: a hub id or a checkpoint folder.
        text: like what the model will be used for; None takes texts that every machine has.
        num_tokens: of the text to use.
        progress: called with (windows done, windows in all).

    Raises:
        ConfigError: the text is too short.
    """
    folder = pretrained.resolve_folder(model)
    windows = cut_windows(pretrained.load_tokenizer(folder), text, num_tokens)
    loaded = load_moe(folder, predictor=None)
    try:
        return record_inputs(loaded, windows, progress=progress)
    finally:
        loaded.moeflow.close()
