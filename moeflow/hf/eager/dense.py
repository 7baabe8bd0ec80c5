"""Dense weights as transformers' own conversion makes them of a checkpoint, one parameter at a time.

Knows names and conversions. Knows nothing of experts' records.
"""

from collections import defaultdict
from functools import partial

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from moeflow.checkpoint.prequantized.scheme import StoredMatrix, find_matrices, stand_ins
from moeflow.checkpoint.prequantized.values import values
from moeflow.errors import CheckpointError
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.hf.quantizer import quantization_scheme


class EagerDenseWeights:
    """The parameters and saved buffers of a checkpoint outside its routed experts, in the dtypes of its files.

    A weight with two places in the model is listed once. Quantised ones become float32.

    Args:
        folder: with a checkpoint; packed ones too.
        model: the empty model of the folder, experts still on it.

    Raises:
        CheckpointError: one has no tensor in the checkpoint, or lacks a piece of a quantised one.
    """

    def __init__(self, folder: ModelFolder, model: PreTrainedModel) -> None:
        self._folder, self._model, tensors = folder, model, folder.checkpoint.tensors
        self._scheme = quantization_scheme(folder.config, str(folder.path))
        self._stored: dict[str, StoredMatrix] = {}
        if self._scheme is not None:
            self._stored = find_matrices(tensors, self._scheme)
            tensors = stand_ins(tensors, self._stored)
        tied = set(model.all_tied_weights_keys) | experts_interface.expert_parameters(model)
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
        self._collected = experts_interface.collect_tensors(model, tensors, set(self.shapes))
        self._opened: dict[int, safe_open] = {}
        missing = [name for name in self.shapes if name not in self._collected]
        if missing:
            raise CheckpointError(
                f"no tensor of {folder.path} feeds {missing[0]}. The checkpoint is incomplete: download it again."
            )

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter.

        Args:
            name: as the model has it, of `shapes`.
        """
        converter, groups, place = self._collected[name]
        if converter is None:
            (((key, entry),),) = groups.values()
            return self._tensor(key, entry.file)
        targets = list(converter.target_patterns)
        first = name.replace(targets[place], targets[0])
        converter.collected_tensors = defaultdict(list)
        for pattern, members in groups.items():
            for key, entry in members:
                converter.add_tensor(first, key, pattern, partial(self._tensor, key, entry.file))
        found = converter.convert(first, model=self._model, config=self._model.config)[name]
        return found[0] if isinstance(found, list) else found

    def _tensor(self, key: str, file: int) -> torch.Tensor:
        matrix = self._stored.get(key)
        if matrix is None:
            return self._read(key, file)
        assert self._scheme is not None, "a quantised matrix is of a scheme"
        pieces = {ending: self._read(name, entry.file) for ending, (name, entry) in matrix.pieces.items()}
        rows, columns = matrix.shape
        try:
            return values(pieces, self._scheme, (rows, columns), torch.float32)
        except ValueError as error:
            raise CheckpointError(f"{key} cannot be used: {error} Download the checkpoint again.") from error

    def _read(self, key: str, file: int) -> torch.Tensor:
        if file not in self._opened:
            self._opened[file] = safe_open(self._folder.checkpoint.files[file], framework="pt")
        return self._opened[file].get_tensor(key)
