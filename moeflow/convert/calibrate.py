"""Loads a model for calibration, and records on a text what GPTQ learns from.

Knows load_moe. Knows nothing of formats.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.calibration.expert_inputs import ExpertInputs, record_inputs
from moeflow.calibration.windows import cut_windows
from moeflow.errors import ConfigError
from moeflow.hf import pretrained
from moeflow.loading.load_moe import load_moe
from moeflow.progress import ProgressCallback


@contextmanager
def model_to_measure(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Give a model with its tokenizer; one that was loaded here is closed at the end.

    Args:
        model: a checkpoint folder or hub id, which is loaded by load_moe (in float32 on a CPU); or a model of load_moe
            or from_pretrained.
        tokenizer: the model's; None loads it from the folder.

    Raises:
        ConfigError: a model in memory comes without its tokenizer.
    """
    if not isinstance(model, (str, Path)):
        if tokenizer is None:
            raise ConfigError(
                "a model in memory does not say how text becomes tokens: give choose_formats its tokenizer."
            )
        yield model, tokenizer
        return
    folder = pretrained.resolve_folder(model)
    tokenizer = tokenizer or pretrained.load_tokenizer(folder)
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    loaded = load_moe(folder, dtype=dtype, predictor=None, policy="lru")
    with loaded.moeflow:
        yield loaded, tokenizer


def record_text(
    model: str | Path,
    text: str | None = None,
    *,
    num_tokens: int = 16384,
    progress: ProgressCallback | None = None,
) -> ExpertInputs:
    """Load a model with its experts offloaded and record the inputs of its experts on a text.

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
    with loaded.moeflow:
        return record_inputs(loaded, windows, progress=progress)
