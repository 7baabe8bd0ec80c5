"""Finds the residual stream in front of each layer's experts in a captured step: the input of the norm that feeds them.

It is what `hf/passes/residual.py` sees by hooks while the model's own code runs.
"""

import torch
from torch.fx import Node

from moeflow.moe.experts import layer_of_handle

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "alias", "detach"}


def find_residuals(graph: torch.fx.Graph) -> dict[int, tuple[str, Node]]:
    """Return, by MoE layer, the path of the norm that feeds its experts and the node of the norm's input.

    Layers whose experts no norm feeds are left out.

    Args:
        graph: of `capture`.
    """
    found: dict[int, tuple[str, Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and _name(node) == "experts":
            norm, source = _norm_of(node.args[0])
            if source is not None and source.meta["val"].numel() == node.args[0].meta["val"].numel():
                found[layer_of_handle(node.args[3])] = norm.removeprefix("model."), source
    return found


def _norm_of(node: Node) -> tuple[str, Node | None]:
    """Return the path of the norm whose output a node is or views, and the one tensor that comes into it."""
    while not (norm := _norm_around(node)):
        if node.op != "call_function" or _name(node) not in _VIEWS or not isinstance(node.args[0], Node):
            return "", None
        node = node.args[0]
    inside: list[Node] = [node]
    outside: set[Node] = set()
    for one in inside:
        for source in one.all_input_nodes:
            if source.op == "call_function" and _norm_around(source) == norm:
                inside.append(source)
            elif "nn_module_stack" in source.meta:  # weights are placeholders, which no module computes
                outside.add(source)
    return norm, outside.pop() if len(outside) == 1 else None


def _norm_around(node: Node) -> str:
    """Return the path of the norm that a node computes a part of; "" where it is in none."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    name = kind if isinstance(kind, str) else kind.__name__
    return path if "norm" in name.rpartition(".")[2].lower() else ""


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.rpartition("::")[2]
