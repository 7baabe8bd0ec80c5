"""Where the weights come from that a model is compared with.

Knows folders. Knows nothing of comparisons.
"""

from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from moeflow.checkpoint.store import ExpertStore
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface, quantizer
from moeflow.hf.eager.gguf import GgufWeights
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.eager.weights import EagerWeights
from moeflow.hf.model_folder import ModelFolder


class ReferenceWeights(Protocol):
    """Experts in float, read one at a time."""

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return one expert's parameters, as the module has them."""

    def close(self) -> None:
        """Close the files."""


def reference_folder(model: str | Path, reference: str | Path | None) -> ModelFolder:
    """Open the folder to compare with: the one that is named, else the model's own.

    Args:
        model: a hub id or a folder.
        reference: likewise; None for the model's own.

    Raises:
        ConfigError: the model's own folder is packed, so that it has no experts in transformers' form.
        ModelSourceError: no such folder or hub id.
    """
    folder = ModelFolder(model if reference is None else reference)
    if reference is None and folder.packed:
        raise ConfigError(
            f"{folder.path} is packed: its experts are not in transformers' form, so there is nothing to compare with. "
            "Give --reference with the folder that it was written from; or --reference with this very folder, to check "
            "the arithmetic on the weights as they lie in it, and not the weights."
        )
    return folder


def open_reference(folder: ModelFolder, model: PreTrainedModel, dtype: torch.dtype) -> ReferenceWeights:
    """Open a folder's experts: by transformers' conversion, by the rules of a GGUF file's architecture, or, of packed
    and quantised ones, as moeflow reads them.

    Args:
        folder: to read.
        model: that is compared; for the form of its experts.
        dtype: that the weights get.

    Raises:
        ConfigError: the folder is of another model.
        CheckpointError: it is damaged or incomplete.
    """
    empty = folder.empty_model()
    check_same_experts(folder, empty, model)
    if not folder.packed and folder.gguf is not None:
        return GgufWeights(folder, empty, dtype)
    if not folder.packed and quantizer.quantization_scheme(folder.config) is None:
        return EagerWeights(folder, dtype)
    store = ExpertStore(folder.expert_files, folder.layers(empty), stamps=folder.expert_stamps)
    return StoredWeights(store, dtype, experts_interface.transposed(empty))


def check_same_experts(folder: ModelFolder, empty: PreTrainedModel, model: PreTrainedModel) -> None:
    """Refuse a folder whose experts are not those of a loaded model, by their modules' names and shapes.

    Args:
        folder: that `empty` is of.
        empty: the empty model of the folder, experts still on it.
        model: loaded.

    Raises:
        ConfigError: they differ.
    """
    wanted = [
        (path, {name: tuple(value.shape) for name, value in module._absent.items()})
        for path, module in experts_interface.experts_modules(model)
    ]
    found = [
        (path, {name: tuple(value.shape) for name, value in module._parameters.items() if value is not None})
        for path, module in experts_interface.experts_modules(empty)
    ]
    if found != wanted:
        odd = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (found[-1], wanted[-1]))
        raise ConfigError(
            f"{folder.path} is of another model: it has {len(found)} layers of experts, the model {len(wanted)}; the "
            f"first that differ are {odd[0]} and {odd[1]}. Give a folder of the same model."
        )
