"""Writes a captured step as a program: one instruction for each node that computes, none for views."""

import operator
from typing import Any

import torch
from torch.fx import Node

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes.capture import CapturedStep
from moeflow.kernels.cpu.step import MAX_DIMS
from moeflow.moe.experts import layer_of_handle
from moeflow.step.elementwise import FILLED, elementwise
from moeflow.step.program import DTYPES, REDUCTIONS, Buffer, Instruction, Operand, Program, Residual
from moeflow.step.residuals import find_residuals

_CHECKS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"}
_WITH_CACHE = {"attend", "attend_latent", "own"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def lower(captured: CapturedStep, num_rows: int) -> Program:
    """Write a captured step as a program.

    Args:
        captured: of `capture`.
        num_rows: its sequences.
    """
    program = _Lowering(captured, num_rows).program()
    program.state_names = list(captured.states)
    return program


class _Lowering:
    """The program as it grows. Every tensor is one on the meta device, whose storage stands for a buffer."""

    def __init__(self, captured: CapturedStep, num_rows: int) -> None:
        self._exported, self._own_calls = captured.exported, captured.own_calls
        self._num_rows = num_rows
        self._buffers: list[Buffer] = []
        self._buffer_of: dict[int, int] = {}  # by storage
        self._storages: list[torch.UntypedStorage] = []  # alive, so that none is taken for another
        self._made: dict[Node, Any] = {}
        self._constant: set[Node] = set()
        self._literals: dict[str, torch.Tensor] = {}
        self._states: list[torch.Tensor] = []
        self._setup: list[Instruction] = []
        self._body: list[Instruction] = []
        self._now = self._body

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

    # ---- Operations; each returns whether it has an instruction of its own ----

    def _elementwise(self, name: str, made: Any, args: list, kwargs: dict[str, Any]) -> bool:
        found = elementwise(name, made, args, kwargs) if isinstance(made, torch.Tensor) else None
        if found is None:
            return False
        op, tensors, attributes = found
        if made.dim() > MAX_DIMS or any(tensor.dtype not in DTYPES for tensor in (made, *tensors)):
            return False
        if (op != "copy" and made.dtype is torch.int64) or (
            op == "copy" and torch.int64 is made.dtype != tensors[0].dtype
        ):
            return False  # whole numbers are computed exactly, in torch
        inputs = tuple(self._operand(tensor.expand(made.shape)) for tensor in tensors)
        self._emit("pointwise", (self._operand(made),), inputs, {"op": op, **attributes})
        return True

    def _linear(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, weight, bias = (*args, None)[:3] if len(args) < 3 else args
        (out,) = outputs
        tensors = [x, weight] + ([] if bias is None else [bias])
        if any(tensor.dtype not in _FLOATS for tensor in tensors) or weight.dim() != 2 or not weight.is_contiguous():
            return False
        if x.dtype != weight.dtype:
            return False
        inputs = [self._contiguous(x), *map(self._operand, tensors[1:])]
        self._emit("linear", (self._operand(out),), tuple(inputs))
        return True

    def _rms_norm(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, weight, eps = args
        self._emit("rms_norm", (self._operand(outputs[0]),), (self._contiguous(x), self._operand(weight)), {"eps": eps})
        return True

    def _experts(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, index, weights, handle = args
        if len(index) != self._num_rows:
            raise UnsupportedModelError(f"its experts take {len(index)} tokens in a step of {self._num_rows}")
        inputs = tuple(map(self._contiguous, (x, index, weights)))
        for operand in (*inputs, self._operand(outputs[0])):
            self._keep_buffer(operand.buffer)
        layer = layer_of_handle(handle)
        self._emit("experts", (self._operand(outputs[0]),), inputs, {"layer": layer})
        return True

    def _attend(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        query, key, value, sinks, layer, scale, window, chunk, soft_cap = args
        inputs = [self._operand(tensor) for tensor in (query, key, value)]
        if sinks is not None:
            inputs.append(self._operand(sinks))
        about = {"layer": layer, "scale": scale, "window": window, "chunk": chunk, "soft_cap": soft_cap}
        self._emit("attend", (self._operand(outputs[0]),), tuple(inputs), about)
        return True

    def _attend_latent(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        query, latent, turned, weight, layer, scale, window, chunk = args
        inputs = [self._operand(tensor) for tensor in (query, latent, turned)] + [self._contiguous(weight)]
        about = {"layer": layer, "scale": scale, "window": window, "chunk": chunk}
        self._emit("attend_latent", (self._operand(outputs[0]),), tuple(inputs), about)
        return True

    def _own(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        tensors, _, number = args
        call = self._own_calls[number]
        self._emit("own", (self._operand(outputs[0]),), tuple(map(self._operand, tensors)), {"call": call})
        return True

    def _embedding(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        table, ids = args[:2]
        if not table.is_contiguous():
            return False
        self._emit("rows", (self._operand(outputs[0]),), (self._operand(table), self._contiguous(ids)))
        return True

    def _softmax(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, dim = args[:2]
        if dim not in (-1, x.dim() - 1) or x.dtype not in _FLOATS or outputs[0].dtype not in _FLOATS:
            return False
        self._emit("softmax", (self._operand(outputs[0]),), (self._contiguous(x),))
        return True

    def _topk(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, dim = args[0], args[2] if len(args) > 2 else -1
        largest = args[3] if len(args) > 3 else kwargs.get("largest", True)
        if dim not in (-1, x.dim() - 1) or not largest or x.dtype not in _FLOATS:
            return False
        values, index = outputs
        self._emit("top_k", (self._operand(values), self._operand(index)), (self._contiguous(x),))
        return True

    def _sum(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        return self._reduce("sum", outputs, args)

    def _mean(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        return self._reduce("mean", outputs, args)

    def _amax(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        return self._reduce("max", outputs, args)

    def _gather(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, dim, index = args[:3]
        if dim not in (-1, x.dim() - 1) or x.shape[:-1] != index.shape[:-1]:
            return False
        self._emit("gather", (self._operand(outputs[0]),), (self._contiguous(x), self._contiguous(index)))
        return True

    def _cat(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        (out,) = outputs
        if any(tensor.dtype != out.dtype or tensor.dim() != out.dim() for tensor in tensors) or out.dtype not in DTYPES:
            return False
        begin = 0
        for tensor in tensors:
            part = out.narrow(dim, begin, tensor.shape[dim])
            begin += tensor.shape[dim]
            self._emit("pointwise", (self._operand(part),), (self._operand(tensor),), {"op": "copy"})
        return True

    def _stack(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        return self._cat(outputs, [[tensor.unsqueeze(dim) for tensor in tensors], dim], {})

    def _repeat_interleave(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, repeats, dim = (*args, kwargs.get("dim"))[:3] if len(args) < 3 else args
        if not isinstance(repeats, int) or dim is None:
            return False
        dim %= x.dim()
        (out,) = outputs
        parts = out.unflatten(dim, (x.shape[dim], repeats))
        if parts.dim() > MAX_DIMS or x.dtype not in DTYPES:
            return False
        inputs = (self._operand(x.unsqueeze(dim + 1).expand(parts.shape)),)
        self._emit("pointwise", (self._operand(parts),), inputs, {"op": "copy"})
        return True

    def _slice_scatter(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        filled: list[Any] = [*args, *(0, None, None, 1)[len(args) - 2 :]]
        x, part, dim, start, end, step = filled
        (out,) = outputs
        if out.dtype not in DTYPES or out.dim() > MAX_DIMS or part.dtype != out.dtype:
            return False
        self._emit("pointwise", (self._operand(out),), (self._operand(x),), {"op": "copy"})
        place = torch.ops.aten.slice.Tensor(out, dim, start, end, step)
        self._emit("pointwise", (self._operand(place),), (self._operand(part),), {"op": "copy"})
        return True

    def _masked_fill(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, mask, value = args
        (out,) = outputs
        if isinstance(value, torch.Tensor) or out.dtype not in _FLOATS or out.dim() > MAX_DIMS:
            return False
        filled = self._number(float(value), out)
        inputs = (self._operand(mask.expand(out.shape)), filled, self._operand(x.expand(out.shape)))
        self._emit("pointwise", (self._operand(out),), inputs, {"op": "where"})
        return True

    def _scatter(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, dim, index, source = args[:4]
        (out,) = outputs
        if dim not in (-1, x.dim() - 1) or kwargs or out.dtype not in DTYPES or index.shape[:-1] != x.shape[:-1]:
            return False
        if isinstance(source, torch.Tensor):
            if source.shape != index.shape or source.dtype != out.dtype:
                return False
            values = self._contiguous(source)
        else:
            values = self._number(float(source), out)
        self._emit("pointwise", (self._operand(out),), (self._operand(x),), {"op": "copy"})
        self._emit("scatter", (self._operand(out),), (self._contiguous(index), values))
        return True

    def _number(self, value: float, like: torch.Tensor) -> Operand:
        """Return a constant of one number, seen in the shape of a tensor."""
        made = torch.empty(1, dtype=like.dtype, device="meta")
        self._buffer(made, "constant", "")
        operand = self._operand(made)
        about = {"op": "aten.full.default", "args": [[1], value], "kwargs": {"dtype": like.dtype}}
        self._setup.append(Instruction("torch", (operand,), (), {**about, "call": torch.ops.aten.full.default}))
        return self._operand(made.expand(like.shape))

    def _reduce(self, op: str, outputs: list, args: list) -> bool:
        x, dims = args[0], args[1] if len(args) > 1 else None
        assert op in REDUCTIONS
        if dims not in ([-1], [x.dim() - 1]) or x.dtype not in _FLOATS or outputs[0].dtype not in _FLOATS:
            return False
        self._emit("reduce", (self._operand(outputs[0]),), (self._contiguous(x),), {"op": op})
        return True

    def _torch(self, node: Node, outputs: list, args: list, kwargs: dict[str, Any]) -> None:
        def of(value: Any) -> Any:
            return self._operand(value) if isinstance(value, torch.Tensor) else value

        named = torch.utils._pytree.tree_map(of, (args, kwargs))
        read = [leaf for leaf in torch.utils._pytree.tree_leaves(named) if isinstance(leaf, Operand)]
        written = tuple(map(self._operand, outputs))
        about = {"op": str(node.target), "args": named[0], "kwargs": named[1], "call": node.target}
        self._emit("torch", written, tuple(read), about)

    # ---- Tensors ----

    def _emit(self, kind: str, outputs: tuple, inputs: tuple, attributes: dict[str, Any] | None = None) -> None:
        self._now.append(Instruction(kind, outputs, inputs, attributes or {}))

    def _buffer(self, made: torch.Tensor, kind: str, name: str) -> None:
        storage = made.untyped_storage()
        if storage._cdata in self._buffer_of:
            return
        self._storages.append(storage)
        self._buffer_of[storage._cdata] = len(self._buffers)
        self._buffers.append(Buffer(kind, name, storage.nbytes()))

    def _operand(self, made: torch.Tensor) -> Operand:
        return Operand(
            self._buffer_of[id_of(made)],
            made.dtype,
            tuple(made.shape),
            tuple(made.stride()),
            int(made.storage_offset()),
        )

    def _contiguous(self, made: torch.Tensor) -> Operand:
        operand = self._operand(made)
        return operand if operand.is_contiguous else self._copied(made)

    def _copied(self, made: torch.Tensor) -> Operand:
        copy = torch.empty(made.shape, dtype=made.dtype, device="meta")
        self._buffer(copy, "made", "")
        self._emit("pointwise", (self._operand(copy),), (self._operand(made),), {"op": "copy"})
        return self._operand(copy)

    def _keep(self, made: torch.Tensor) -> Operand:
        self._keep_buffer(self._buffer_of[id_of(made)])
        return self._operand(made)

    def _keep_buffer(self, number: int) -> None:
        buffer = self._buffers[number]
        if buffer.kind == "made":
            self._buffers[number] = Buffer("kept", buffer.name, buffer.num_bytes)


def id_of(made: torch.Tensor) -> int:
    """Return what tells a meta tensor's storage from others."""
    return made.untyped_storage()._cdata


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return target._schema.name.rpartition("::")[2] if hasattr(target, "_schema") else str(target)
