"""Rules read backwards: which tensors of a GGUF file a parameter becomes.

Knows names. Knows nothing of values.
"""

import re

from moeflow.errors import UnsupportedModelError
from moeflow.hf.gguf.architecture import Rule

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def rule_of(rules: list[Rule], parameter: str) -> Rule:
    """Return the first rule for a parameter, by which it is written.

    Args:
        rules: of the architecture.
        parameter: its name in the model.

    Raises:
        UnsupportedModelError: there is none.
    """
    template = _LAYER.sub("{layer}", parameter, count=1)
    for rule in rules:
        if rule.parameter in (parameter, template):
            return rule
    raise UnsupportedModelError(f"{parameter} has no place in a GGUF file of this architecture.")


def tensor_names(rule: Rule, parameter: str) -> list[str]:
    """Return the names of the tensors that a parameter becomes by a rule."""
    found = _LAYER.search(parameter)
    return [name.replace("{layer}", found[0] if found else "") for name in rule.tensors]
