"""The dense weights of a GGUF file: given to transformers one by one as it loads, or kept in their blocks.

Knows rules and tensors of the file. Knows nothing of experts.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from moeflow.checkpoint.gguf.file import GgufFile
from moeflow.errors import CheckpointError
from moeflow.hf.gguf.block_modules import keep_in_blocks
from moeflow.hf.gguf.feeding import Fed
from moeflow.hf.gguf.values import read_bytes, read_values
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

_KEPT = (torch.nn.Linear, torch.nn.Embedding)


class DenseWeights:
    """What feeds the dense parameters of one model.

    Args:
        file: the GGUF file.
        config: of the model.
        fed: what feeds each parameter, experts' ones among them.
        expert_names: the parameters of experts, which others read.
        dtype: of the model.
        keeps_blocks: whether linears and embeddings stay in blocks.
    """

    def __init__(
        self,
        file: GgufFile,
        config: Any,
        fed: dict[str, Fed],
        expert_names: Collection[str],
        dtype: torch.dtype,
        *,
        keeps_blocks: bool,
    ) -> None:
        self._file = file
        self._config = config
        self._fed = {name: feeding for name, feeding in fed.items() if name not in expert_names}
        self._dtype = dtype
        self._keeps_blocks = keeps_blocks
        self._taken: list[tuple[str, list[str]]] = []  # a parameter in blocks, and the modules that share it

    def check(self, empty: PreTrainedModel) -> None:
        """Refuse a file whose dense tensors are not those of the model, before anything large is read.

        Args:
            empty: the empty model.

        Raises:
            CheckpointError: one has another number of values than the model's parameter.
        """
        for name, parameter in empty.named_parameters(remove_duplicate=False):
            fed = self._fed.get(name)
            if fed is None:
                continue
            held = sum(math.prod(self._file.tensors[tensor].shape) for tensor in fed.tensors)
            if held != parameter.numel():
                shapes = " and ".join(str(list(self._file.tensors[tensor].shape)) for tensor in fed.tensors)
                raise CheckpointError(
                    f"{self._file.files[0]}: {name} is {list(parameter.shape)} by the config and {shapes} in the file. "
                    "Its metadata, or the config.json beside it, is of another model."
                )

    def take_off(self, empty: PreTrainedModel) -> None:
        """Take the weights that stay in blocks off an empty model, and keep the loader quiet about them."""
        if not self._keeps_blocks:
            return
        users: dict[int, list[str]] = {}
        for path, module in empty.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None:
                users.setdefault(id(weight), []).append(path)
        tied = {**(getattr(empty, "all_tied_weights_keys", None) or {})}
        ignored = set(empty._keys_to_ignore_on_load_unexpected or ())
        for paths in users.values():
            name = next((f"{path}.weight" for path in paths if f"{path}.weight" in self._fed), None)
            if name is None or not self._stays(empty, name):
                continue
            sharing = [*paths, *(target.removesuffix(".weight") for target, source in tied.items() if source == name)]
            sharing = list(dict.fromkeys(sharing))
            if not all(isinstance(empty.get_submodule(path), _KEPT) for path in sharing):
                continue
            for path in sharing:
                _take_weight(empty, path)
            self._taken.append((name, sharing))
            ignored.add("^" + re.escape(name) + "$")
        empty._keys_to_ignore_on_load_unexpected = ignored

    def _stays(self, empty: PreTrainedModel, name: str) -> bool:
        """Whether a parameter is a matrix whose blocks the model's module can use as they are."""
        fed = self._fed[name]
        entries = [self._file.tensors[tensor] for tensor in fed.tensors]
        types = {entry.dtype for entry in entries}
        return (
            fed.rule.change.moves_rows
            and len(types) == 1
            and BLOCK_TYPES[next(iter(types))].block_values > 1
            and all(len(entry.shape) == 2 for entry in entries)
            and type(empty.get_submodule(name.removesuffix(".weight"))) in _KEPT
        )

    def state_dict(self, errors: list[Exception]) -> dict[str, "_Lazy"]:
        """Return what transformers loads: {parameter: values that are read when it asks for them}.

        Args:
            errors: receives what reading raises, since transformers tells it in words of its own.
        """
        return {name: _Lazy(self, name, errors) for name in self._fed}

    def fill(self, loaded: PreTrainedModel) -> None:
        """Read the blocks of the weights that were taken off into their modules."""
        for name, paths in self._taken:
            fed = self._fed[name]
            parts = [read_bytes(self._file, tensor) for tensor in fed.tensors]
            blocks = fed.rule.change.read(parts, self._config).contiguous()
            (dtype,) = {self._file.tensors[tensor].dtype for tensor in fed.tensors}
            for path in paths:
                keep_in_blocks(loaded.get_submodule(path), blocks, BLOCK_TYPES[dtype].format, self._dtype)

    def values(self, name: str) -> torch.Tensor:
        """Read one parameter's values, in the file's precision: transformers rounds them as its model asks."""
        fed = self._fed[name]
        parts = [read_values(self._file, tensor) for tensor in fed.tensors]
        return fed.rule.change.read(parts, self._config)


class _Lazy:
    """One parameter that is read when transformers asks for it, as it asks slices of safetensors."""

    def __init__(self, weights: DenseWeights, name: str, errors: list[Exception]) -> None:
        self._weights = weights
        self._name = name
        self._errors = errors

    def __getitem__(self, _: Any) -> torch.Tensor:
        try:
            return self._weights.values(self._name)
        except Exception as error:
            self._errors.append(error)
            raise


def _take_weight(model: PreTrainedModel, path: str) -> None:
    """Take a module's weight off an empty model; an attribute of its shape without memory stays."""
    module: Any = model.get_submodule(path)
    stub: Any = module._parameters.pop("weight")
    stub._is_hf_initialized = True
    module.__dict__["weight"] = stub
    module._is_hf_initialized = True
    for submodule in model.modules():
        tied = getattr(submodule, "all_tied_weights_keys", {})
        for target in [target for target, source in tied.items() if f"{path}.weight" in (target, source)]:
            tied.pop(target)
