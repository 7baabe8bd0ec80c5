"""Writes a captured step as a program: one instruction for each node that computes, none for views."""

import operator
from typing import Any

import torch
from torch.fx import Node

from moeflow.hf.passes.capture import CapturedStep
from moeflow.kernels.cpu.structs import block_number
from moeflow.step.elementwise import FILLED
from moeflow.step.operations import Operations, id_of
from moeflow.step.program import Operand, Program, Residual
from moeflow.step.residuals import find_residuals

_CHECKS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"}
_WITH_CACHE = {"attend", "attend_latent", "own"}


def lower(captured: CapturedStep, num_rows: int) -> Program:
    """Write a captured step as a program.

    Args:
        captured: of `capture`.
        num_rows: its sequences.
    """
    program = _Lowering(captured, num_rows).program()
    program.state_names = list(captured.states)
    return program


class _Lowering(Operations):
    """Goes through a graph."""

    def __init__(self, captured: CapturedStep, num_rows: int) -> None:
        super().__init__(num_rows, captured.own_calls)
        self._exported = captured.exported
        self._made: dict[Node, Any] = {}
        self._constant: set[Node] = set()
        self._literals: dict[str, torch.Tensor] = {}
        self._states: list[torch.Tensor] = []

    def program(self) -> Program:
        """Go through the graph once."""
        logits: Any = None
        self._exported.graph.eliminate_dead_code()  # keys and values that latents were expanded to
        for node in self._exported.graph.nodes:
            if node.op == "placeholder":
                self._place(node)
            elif node.op == "output":
                logits, *states = torch.fx.map_arg(node.args[0], lambda made: self._made[made])
            else:
                self._call(node)
        assert logits is not None
        found = find_residuals(self._exported.graph).items()
        seen = {layer: Residual(norm, self._keep(self._made[node])) for layer, (norm, node) in found}
        kept = self._keep(logits)
        self._write_states(states)
        return Program(
            self._num_rows, self._buffers, self._setup, self._body, kept, seen, self._literals,
            [self._operand(state) for state in self._states],
        )  # fmt: skip

    def _write_states(self, made: list[torch.Tensor]) -> None:
        """Write new states at the end, so that a step which fails before may run again."""
        kept = {id_of(state) for state in self._states}
        sources = [
            self._copied(new) if id_of(new) in kept and new is not old else self._operand(new)
            for old, new in zip(self._states, made, strict=True)
        ]
        for old, source in zip(self._states, sources, strict=True):
            if source != self._operand(old):
                self._emit("pointwise", (self._operand(old),), (source,), {"op": "copy"})

    def _place(self, node: Node) -> None:
        signature = self._exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        if node.name in names or node.name in constants:
            name = names.get(node.name) or constants[node.name]
            found = self._exported.state_dict.get(name)
            found = self._exported.constants[name] if found is None else found
            made = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device="meta")
            if node.name in names:
                self._buffer(made, "weight", name.removeprefix("model."))
            else:
                self._buffer(made, "literal", name)
                self._literals[name] = found
            self._constant.add(node)
        else:
            value = node.meta["val"]
            made = torch.empty(value.shape, dtype=value.dtype, device="meta")
            is_state = node.name.startswith("states_")
            self._buffer(made, "state" if is_state else "input", node.name)
            if is_state:
                self._states.append(made)
        self._made[node] = made

    def _call(self, node: Node) -> None:
        name = _name(node.target)
        if name in _CHECKS:
            return
        args: Any = torch.fx.map_arg(list(node.args), lambda made: self._made[made])
        kwargs: Any = dict(torch.fx.map_arg(dict(node.kwargs), lambda made: self._made[made]))
        target: Any = node.target
        if "device" in kwargs:
            kwargs["device"] = "meta"
        with torch.no_grad():
            made = self._made[node] = target(*args, **kwargs)
        if name == "clone" and made.stride() == args[0].stride():  # nothing is written twice
            made = self._made[node] = args[0]
        if name == "getitem":
            if node.args[0] in self._constant:
                self._constant.add(node)
            return
        outputs = list(made) if isinstance(made, (tuple, list)) else [made]
        if all(id_of(output) in self._buffer_of for output in outputs):
            if all(source in self._constant for source in node.all_input_nodes):
                self._constant.add(node)
            return  # views
        is_constant = name in FILLED or (
            name not in _WITH_CACHE and all(source in self._constant for source in node.all_input_nodes)
        )
        for output in outputs:
            self._buffer(output, "constant" if is_constant else "made", "")
        if is_constant:
            self._constant.add(node)
        self._now = self._setup if is_constant else self._body
        lowered = getattr(self, f"_{name}", None)
        if is_constant or not (
            lowered(outputs, args, kwargs) if lowered else self._elementwise(name, made, args, kwargs)
        ):
            self._torch(node, outputs, args, kwargs)

    def _lossless_linear(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, *parts = args
        inputs = [self._contiguous(x), *(self._operand(part) for part in parts if part is not None)]
        self._emit("linear", (self._operand(outputs[0]),), tuple(inputs))
        return True

    def _lossless_rows(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        ids, *parts = args[:4]
        self._emit("rows", (self._operand(outputs[0]),), (self._contiguous(ids), *map(self._operand, parts)))
        return True

    def _block_linear(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, blocks, form, *bias = args
        if block_number(form) is None:
            return False
        inputs = [self._contiguous(x), *(self._operand(part) for part in (blocks, *bias) if part is not None)]
        self._emit("linear", (self._operand(outputs[0]),), tuple(inputs), {"formats": [form]})
        return True

    def _block_rows(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        ids, blocks, form = args[:3]
        if block_number(form) is None:
            return False
        inputs = (self._contiguous(ids), self._operand(blocks))
        self._emit("rows", (self._operand(outputs[0]),), inputs, {"formats": [form]})
        return True

    def _torch(self, node: Node, outputs: list, args: list, kwargs: dict[str, Any]) -> None:
        def of(value: Any) -> Any:
            return self._operand(value) if isinstance(value, torch.Tensor) else value

        named = torch.utils._pytree.tree_map(of, (args, kwargs))
        read = [leaf for leaf in torch.utils._pytree.tree_leaves(named) if isinstance(leaf, Operand)]
        written = tuple(map(self._operand, outputs))
        about = {"op": str(node.target), "args": named[0], "kwargs": named[1], "call": node.target}
        self._emit("torch", written, tuple(read), about)


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return target._schema.name.rpartition("::")[2] if hasattr(target, "_schema") else str(target)
