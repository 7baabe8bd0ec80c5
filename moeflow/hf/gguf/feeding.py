"""Which tensors of a GGUF file feed which parameter of a model, by its architecture's rules.

Knows names and rules. Knows nothing of bytes.
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from moeflow.errors import CheckpointError
from moeflow.hf.gguf.architecture import Architecture, Rule

_LAYER, _EXPERT = "{layer}", "{expert}"


class Fed(NamedTuple):
    """What feeds a parameter.

    Args:
        rule: the one that says so.
        tensors: names in the file, in the rule's order; with `{expert}` where each expert has its own.
    """

    rule: Rule
    tensors: tuple[str, ...]

    def of_expert(self, expert: int) -> list[str]:
        """Return the names for one expert; those of stacked tensors for any."""
        return [name.replace(_EXPERT, str(expert)) for name in self.tensors]

    @property
    def is_per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return _EXPERT in self.tensors[0]


def feed(architecture: Architecture, config: Any, parameters: Collection[str], held: Collection[str]) -> dict[str, Fed]:
    """Find what feeds each parameter; those that nothing feeds are left out.

    Args:
        architecture: of the file.
        config: of the model.
        parameters: their names in the model.
        held: names of the file's tensors.

    Raises:
        CheckpointError: the file has a tensor that feeds nothing, so that leaving it out would change the model.
    """
    found: dict[str, Fed] = {}
    for rule in architecture.rules(config):
        pattern = re.compile(re.escape(rule.parameter).replace(re.escape(_LAYER), r"(\d+)"))
        for name in parameters:
            match = None if name in found else pattern.fullmatch(name)
            if match is None:
                continue
            layer = match[1] if match.groups() else ""
            fed = Fed(rule, tuple(tensor.replace(_LAYER, layer) for tensor in rule.tensors))
            if all(tensor in held for tensor in fed.of_expert(0)):
                found[name] = fed
    used = {tensor for fed in found.values() for tensor in fed.tensors}
    numbered = [re.compile(re.escape(name).replace(re.escape(_EXPERT), r"\d+")) for name in used if _EXPERT in name]
    # Blocks after the layers that predict further tokens: models of transformers have none.
    further = {name.split(".nextn.")[0] for name in held if ".nextn." in name}
    ignored = [
        re.compile(pattern) for pattern in (*architecture.ignored, *(re.escape(block) + r"\..*" for block in further))
    ]
    for name in held:
        if name not in used and not any(pattern.fullmatch(name) for pattern in (*numbered, *ignored)):
            raise CheckpointError(
                f"the file has the tensor {name}, for which moeflow knows no place in a {architecture.model_type} "
                f"model (GGUF's {architecture.name}). Without it the model would compute something else: use another "
                "file of the model, and report this one."
            )
    return found
