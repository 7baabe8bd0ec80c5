"""What an architecture of GGUF is in transformers: a config, and a rule for every parameter. Both ways.

llama.cpp's converter renames tensors, and changes the values of some. A rule says which tensors of the file make a
parameter of the model, and how; read one way it loads a file, the other way it writes one.

Knows names and small changes of tensors. Knows nothing of files or blocks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

Tensors = Mapping[str, Callable[[], torch.Tensor]]  # name in the file -> reads its values as float32


class Change(Protocol):
    """What happens to a tensor between the file and the model.

    Attributes:
        moves_rows: whether whole rows only move (or stay). `read` then takes [N, bytes] blocks as well as values.
    """

    moves_rows: bool

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        """Make the parameter of the file's tensors, all in torch's order of dimensions."""

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        """Make the file's tensors of the parameter: the inverse of `read`."""


class Same:
    """The tensor is the parameter."""

    moves_rows = True

    def read(self, tensors: list[torch.Tensor], config: Any) -> torch.Tensor:
        (found,) = tensors
        return found

    def write(self, parameter: torch.Tensor, config: Any) -> list[torch.Tensor]:
        return [parameter]


class Rule(NamedTuple):
    """How one parameter, in every layer that has it, comes from the file.

    Args:
        parameter: its name in the model (`state_dict`), with `{layer}` for the layer's number.
        tensors: names in the file, with `{layer}`, and `{expert}` where each expert has a tensor of its own. An
            expert's parameter [E, ..] of several tensors: their rows follow one another in each expert.
        change: between the two.
        interleaves: of an expert's parameter of two tensors: whether their rows take turns instead (gpt-oss).
    """

    parameter: str
    tensors: tuple[str, ...]
    change: Change = Same()
    interleaves: bool = False


class Architecture(NamedTuple):
    """One architecture.

    Args:
        name: `general.architecture` in the file.
        model_type: of transformers' config.
        config: (the file's metadata, its tensors) -> the fields of config.json, `model_type` and `architectures` with
            them. Of the tensors, each name has a function that reads the values as float32: some hold factors of
            positions, which config.json has. Raises KeyError for a key that the metadata lacks.
        metadata: a config of transformers -> the file's metadata without `general.*` and `tokenizer.*`; keys have the
            architecture's name in front. None where moeflow does not write the architecture.
        rules: a config -> rules. Of several rules for one parameter the first counts whose tensors are all there.
        ignored: patterns (re.fullmatch) of tensors that no parameter needs.
        variants: other model types that are written under this name.
        extra: a config -> tensors of the file that hold no parameter, by name: the factors of positions.
    """

    name: str
    model_type: str
    config: Callable[[Mapping[str, Any], Tensors], dict[str, Any]]
    metadata: Callable[[Any], dict[str, Any]] | None
    rules: Callable[[Any], list[Rule]]
    ignored: tuple[str, ...] = (r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight")
    variants: tuple[str, ...] = ()
    extra: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
