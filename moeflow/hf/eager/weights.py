"""An expert's weights as transformers' own conversion makes them of a checkpoint, one expert at a time.

moeflow's own way from file to slot (byte ranges of `expert_sources`) has no part in it, so that a fault there shows.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from moeflow.checkpoint.pieces import Feeding
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf import experts_interface, pretrained
from moeflow.hf.model_folder import ModelFolder


class EagerWeights:
    """The experts of a checkpoint in float, converted by transformers.

    Args:
        folder: neither packed nor quantised.
        dtype: that the weights get.

    Raises:
        CheckpointError: an expert's tensor is missing.
    """

    def __init__(self, folder: ModelFolder, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._model = pretrained.empty_model(folder.config, dtype)
        pretrained.check_sizes(self._model, folder.checkpoint)
        self._collected = experts_interface.collect_expert_tensors(self._model, folder.checkpoint.tensors)
        self._alone = _OfOneExpert(self._model)
        self._opened: dict[int, safe_open] = {}
        self._names = [
            [f"{path}.{name}" for name, value in module._parameters.items() if value is not None]
            for path, module in experts_interface.experts_modules(self._model)
        ]
        missing = [name for names in self._names for name in names if name not in self._collected]
        if missing:
            raise CheckpointError(
                f"no tensor of {folder.path} feeds {missing[0]}. The checkpoint is incomplete: download it again."
            )

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stacked parameter of a layer: [num_experts, ...]."""
        return {name.rpartition(".")[2]: tuple(self._model.get_parameter(name).shape) for name in self._names[layer]}

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return one expert's parameters, as the module has them.

        Args:
            layer: number among the MoE layers.
            expert: its number.

        Raises:
            UnsupportedModelError: transformers' conversion mixes experts.
        """
        return {name.rpartition(".")[2]: self._parameter(name, expert) for name in self._names[layer]}

    def parameter(self, layer: int, name: str, expert: int) -> torch.Tensor:
        """Return one parameter of an expert, as the module has it; otherwise as `read`."""
        return self._parameter(next(full for full in self._names[layer] if full.rpartition(".")[2] == name), expert)

    def close(self) -> None:
        """Forget the files, which close with their last reader."""
        self._opened.clear()

    def _parameter(self, name: str, expert: int) -> torch.Tensor:
        feeding = self._collected[name]
        converter = feeding.converter
        num_experts = self._model.get_parameter(name).shape[0]
        if converter is None:
            (members,) = feeding.groups.values()
            return self._slice(members[0][0], members[0][1].file, expert).squeeze(0)
        targets = list(converter.target_patterns)
        first = name.replace(targets[feeding.place], targets[0])
        converter.collected_tensors = defaultdict(list)
        for pattern, keys, stacked in _sources(feeding, expert, num_experts):
            for key, file in keys:
                load = partial(self._slice, key, file, expert) if stacked else partial(self._whole, key, file)
                converter.add_tensor(first, key, pattern, load)
        found = converter.convert(first, model=self._alone, config=self._model.config)[name]
        value = found[0] if isinstance(found, list) else found
        if value.shape[0] != 1:
            raise UnsupportedModelError(
                f"{name} cannot be converted one expert at a time: transformers makes {list(value.shape)} of one. "
                "Write the model anew with from_pretrained(...).save_pretrained(...), and give that folder."
            )
        return value.squeeze(0)

    def _whole(self, key: str, file: int) -> torch.Tensor:
        return self._open(file).get_tensor(key).to(self._dtype)

    def _slice(self, key: str, file: int, expert: int) -> torch.Tensor:
        return self._open(file).get_slice(key)[expert : expert + 1].to(self._dtype)

    def _open(self, file: int) -> "safe_open":
        if file not in self._opened:
            self._opened[file] = safe_open(self._folder.checkpoint.files[file], framework="pt")
        return self._opened[file]


class _OfOneExpert:
    """A model to transformers' conversions, which ask it for the shape that a parameter should have."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a stacked parameter as it is with one expert, without memory."""
        return self._model.get_parameter(name)[:1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _sources(feeding: Feeding, expert: int, num_experts: int) -> list[tuple[str, list[tuple[str, int]], bool]]:
    """Return the tensors that feed one expert, by source pattern: (pattern, [(name, file)], whether they are stacked).

    One list of experts may feed several modules, in equal parts.
    """
    found = []
    for pattern, members in feeding.groups.items():
        stacked = "*" not in pattern
        chosen = members if stacked else members[expert::num_experts]
        found.append((pattern, [(key, entry.file) for key, entry in chosen], stacked))
    return found
