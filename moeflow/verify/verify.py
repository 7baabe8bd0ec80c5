"""Verifies a model: every layer's experts, as moeflow runs them, against transformers' own eager experts.

In memory are the dense weights, one layer's experts in slots, and one expert of the reference.
"""

from pathlib import Path
from typing import Any

import torch

from moeflow.hf import experts_interface
from moeflow.hf.eager.gguf import GgufWeights
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.eager.weights import EagerWeights
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.load_moe import load_moe
from moeflow.memory_size import MemorySize
from moeflow.progress import ProgressCallback
from moeflow.verify.compare import Comparison
from moeflow.verify.findings import Verified
from moeflow.verify.reference import open_reference, reference_folder
from moeflow.verify.text import token_rows


def verify(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | list[list[int]] | None = None,
    num_tokens: int = 256,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    expert_memory: MemorySize | None = None,
    progress: ProgressCallback | None = None,
) -> Verified:
    """Compare a model's experts, as moeflow runs them, with transformers' own, layer by layer on one text.

    Args:
        model: a hub id or a folder, packed and quantised ones too.
        reference: the folder that the experts should be those of; None takes the model's own.
        text: to run, or rows of token ids; None takes the Python standard library's.
        num_tokens: of the text.
        dtype: as of load_moe.
        device: likewise.
        expert_memory: likewise; None takes the bytes of one layer's experts.
        progress: called with (layers compared, layers in all).

    Returns:
        The figures of every layer, and the differences beyond the bound that docs/verify.md explains.

    Raises:
        ConfigError: nothing to compare with, no text, or a reference of another model.
        CheckpointError: a folder is damaged, or has no tokenizer.
        ExpertReadError: an expert cannot be read, or its checksum does not agree.
    """
    folder, other = ModelFolder(model), reference_folder(model, reference)
    rows = token_rows(folder.path, text, num_tokens)
    loaded = load_for_passes(folder, dtype=dtype, device=device, expert_memory=expert_memory)
    with loaded.moeflow as runtime:
        weights = open_reference(other, loaded, loaded.dtype)
        own = StoredWeights(runtime.store, loaded.dtype, experts_interface.transposed(loaded))
        comparison = Comparison(loaded, own, weights, [token for row in rows for token in row], progress)
        try:
            run_rows(loaded, rows)
        finally:
            comparison.close()
            weights.close()
    return Verified(
        folder.name, other.name, isinstance(weights, EagerWeights | GgufWeights),
        str(loaded.dtype).removeprefix("torch."), sum(map(len, rows)), comparison.bound,
        comparison.layers, comparison.findings,
    )  # fmt: skip


def load_for_passes(
    folder: ModelFolder,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    expert_memory: MemorySize | None = None,
) -> Any:
    """Load a model for a few passes over many tokens, which meet one layer after the other.

    Args:
        folder: of the model.
        dtype: as of load_moe.
        device: likewise.
        expert_memory: likewise; None takes the bytes of one layer's experts.
    """
    if expert_memory is None:
        empty = folder.empty_model()
        expert_memory = layer_bytes(folder, empty)
    return load_moe(folder.path, dtype=dtype, device=device, expert_memory=expert_memory, predictor=None, step="python")


def layer_bytes(folder: ModelFolder, empty: Any) -> int:
    """Return the bytes that the largest layer's experts take, and no less than the least that a model runs with.

    Args:
        folder: of the model.
        empty: its empty model, experts still on it.
    """
    layouts = [source.layout for source in folder.layers(empty)]
    size = ExpertsSize.of(layouts, experts_interface.num_experts_per_tok(empty))
    return max(size.min_bytes, min(max(layout.num_experts for layout in layouts) * size.slot_bytes, size.all_bytes))


@torch.no_grad()
def run_rows(model: Any, rows: list[list[int]]) -> None:
    """Run a model's layers over rows of token ids, without its head."""
    tokens = torch.tensor(rows, device=next(model.parameters()).device)
    model.base_model(input_ids=tokens, use_cache=False)
