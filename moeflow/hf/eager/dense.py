"""Dense weights as transformers' own conversion makes them of a checkpoint, one parameter at a time.

Knows names and conversions. Knows nothing of experts' records.
"""

from collections import defaultdict
from functools import partial

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from moeflow.errors import CheckpointError
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder


class DenseWeights:
    """The parameters and saved buffers of a checkpoint outside its routed experts, in the dtypes of its files.

    A weight with two places in the model is listed once.

    Args:
        folder: not quantised.
        model: the empty model of the folder, experts still on it.

    Raises:
        CheckpointError: one has no tensor in the checkpoint.
    """

    def __init__(self, folder: ModelFolder, model: PreTrainedModel) -> None:
        self._folder, self._model = folder, model
        tied = set(model.all_tied_weights_keys) | experts_interface.expert_parameters(model)
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
        self._collected = experts_interface.collect_tensors(model, folder.checkpoint.tensors, set(self.shapes))
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
        if file not in self._opened:
            self._opened[file] = safe_open(self._folder.checkpoint.files[file], framework="pt")
        return self._opened[file].get_tensor(key)
