"""An expert's weights as a GGUF file tells them: whole tensors, blocks by GGML's formulas, and the family's rules.

moeflow's own way from file to slot (byte ranges of `gguf/expert_sources`) has no part in it, so that a fault there
shows.
"""

import torch
from transformers import PreTrainedModel

from moeflow.errors import CheckpointError
from moeflow.hf import experts_interface
from moeflow.hf.gguf.feeding import Fed
from moeflow.hf.gguf.values import read_bytes, values_of
from moeflow.hf.model_folder import ModelFolder


class GgufWeights:
    """The experts of a GGUF file in float. The bytes of one layer are in memory, and the values of one expert.

    Args:
        folder: that stands for the file.
        empty: its empty model, experts still on it.
        dtype: that the weights get.

    Raises:
        CheckpointError: an expert's tensor is missing.
    """

    def __init__(self, folder: ModelFolder, empty: PreTrainedModel, dtype: torch.dtype) -> None:
        assert folder.gguf is not None, "a folder that stands for a GGUF file"
        self._file, self._dtype, self._model = folder.gguf, dtype, empty
        self._fed = folder.fed(empty)
        self._names = [
            [f"{path}.{name}" for name, value in module._parameters.items() if value is not None]
            for path, module in experts_interface.experts_modules(empty)
        ]
        self._held: dict[str, torch.Tensor] = {}  # bytes of tensors by name
        missing = [name for names in self._names for name in names if name not in self._fed]
        if missing:
            raise CheckpointError(
                f"no tensor of {folder.name} feeds {missing[0]}. The file is incomplete: download it again."
            )

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return one expert's parameters, as the module has them.

        Args:
            layer: number among the MoE layers.
            expert: its number.
        """
        tensors = {tensor for name in self._names[layer] for tensor in self._fed[name].of_expert(expert)}
        self._held = {name: raw for name, raw in self._held.items() if name in tensors}
        return {name.rpartition(".")[2]: self._parameter(name, expert) for name in self._names[layer]}

    def close(self) -> None:
        """Give the bytes up."""
        self._held.clear()

    def _parameter(self, name: str, expert: int) -> torch.Tensor:
        fed, wanted = self._fed[name], self._model.get_parameter(name)
        parts = [self._values(tensor, fed, expert, wanted.shape[0]) for tensor in fed.of_expert(expert)]
        if fed.rule.interleaves:
            value = torch.stack(parts, dim=1).flatten(0, 1)
        else:
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
        path = name.rpartition(".")[0]
        if self._model.get_submodule(path).is_transposed and value.dim() == 2:
            value = value.T
        return value.reshape(wanted.shape[1:]).to(self._dtype).contiguous()

    def _values(self, tensor: str, fed: Fed, expert: int, num_experts: int) -> torch.Tensor:
        """Return one expert's values of a tensor in float32, [rows, ..]."""
        entry = self._file.tensors[tensor]
        if tensor not in self._held:
            self._held[tensor] = read_bytes(self._file, tensor)
        raw, shape = self._held[tensor], entry.shape
        if not fed.is_per_expert:
            raw, shape = raw.view(num_experts, -1)[expert : expert + 1], entry.shape[1:]
        return values_of(raw.contiguous(), entry.dtype, tensor).float().view(shape)
