"""Operations of torch as instructions of a program: a rule for each that has any."""

from typing import Any

import torch

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes.own_modules import OwnCall
from moeflow.kernels.cpu.step import MAX_DIMS
from moeflow.moe.experts import layer_of_handle
from moeflow.step.elementwise import elementwise
from moeflow.step.program import DTYPES, REDUCTIONS, Buffer, Instruction, Operand

_MOST_PRODUCTS = 1 << 18  # of a product of matrices whose products are written down
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Operations:
    """A program as it grows. Every tensor is one on the meta device, whose storage stands for a buffer.

    A rule is named as torch's operation, gets the tensors that it returns and its arguments, and returns whether it
    wrote instructions.

    Args:
        num_rows: sequences of a step.
        own_calls: of modules that stay the model's Python.
    """

    def __init__(self, num_rows: int, own_calls: list[OwnCall]) -> None:
        self._num_rows = num_rows
        self._own_calls = own_calls
        self._buffers: list[Buffer] = []
        self._buffer_of: dict[int, int] = {}  # by storage
        self._storages: list[torch.UntypedStorage] = []  # alive, so that none is taken for another
        self._setup: list[Instruction] = []
        self._body: list[Instruction] = []
        self._now = self._body

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
        self._emit("rows", (self._operand(outputs[0]),), (self._contiguous(ids), self._operand(table)))
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

    def _reduce(self, op: str, outputs: list, args: list) -> bool:
        x, dims = args[0], args[1] if len(args) > 1 else None
        assert op in REDUCTIONS
        if (
            not isinstance(dims, (list, tuple))
            or len(dims) != 1
            or x.dtype not in _FLOATS
            or outputs[0].dtype not in _FLOATS
        ):
            return False
        self._emit("reduce", (self._operand(outputs[0]),), (self._contiguous(x.movedim(dims[0], -1)),), {"op": op})
        return True

    def _matmul(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        a, b = args
        (out,) = outputs
        size = out.numel() * a.shape[-1]
        if a.dim() != b.dim() or a.dim() < 2 or a.dim() + 1 > MAX_DIMS or size > _MOST_PRODUCTS:
            return False
        shape = (*out.shape, a.shape[-1])
        left, right = a.unsqueeze(-2).expand(shape), b.transpose(-1, -2).unsqueeze(-3).expand(shape)
        return self._sum_of_products(out, left, right)

    _bmm = _matmul

    def _conv1d(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        rest: list[Any] = [None, [1], [0], [1], 1]
        x, weight, bias, stride, padding, dilation, groups = [*args, *rest[len(args) - 2 :]]
        (out,) = outputs
        is_plain = list(stride) == [1] and list(padding) == [0] and list(dilation) == [1]
        if (
            not is_plain
            or groups != x.shape[1]
            or weight.shape[0] != groups
            or (bias is not None and bias.dtype != x.dtype)
        ):
            return False
        windows = x.unfold(-1, weight.shape[-1], 1)
        made = out if bias is None else torch.empty(out.shape, dtype=torch.float32, device="meta")
        if not self._sum_of_products(made, windows, weight[None, :, 0, None].expand(windows.shape)):
            return False
        if bias is not None:
            inputs = self._operand(made), self._operand(bias[:, None].expand(out.shape))
            self._emit("pointwise", (self._operand(out),), inputs, {"op": "add"})
        return True

    def _sum_of_products(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Write the sums over the last dimension of a times b, in float32, to a tensor without it."""
        if any(tensor.dtype not in _FLOATS for tensor in (out, a, b)):
            return False
        self._buffer(out, "made", "")
        products = torch.empty(a.shape, dtype=torch.float32, device="meta")
        self._buffer(products, "made", "")
        self._emit("pointwise", (self._operand(products),), (self._operand(a), self._operand(b)), {"op": "mul"})
        self._emit("reduce", (self._operand(out),), (self._operand(products),), {"op": "sum"})
        return True

    def _select_scatter(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, part, dim, index = args
        (out,) = outputs
        if out.dtype not in DTYPES or out.dim() > MAX_DIMS or part.dtype != out.dtype:
            return False
        self._emit("pointwise", (self._operand(out),), (self._operand(x),), {"op": "copy"})
        self._emit("pointwise", (self._operand(out.select(dim, index)),), (self._operand(part),), {"op": "copy"})
        return True

    def _clamp(self, outputs: list, args: list, kwargs: dict[str, Any]) -> bool:
        x, least, most = [*args, None, None][:3]
        least, most = kwargs.get("min", least), kwargs.get("max", most)
        (out,) = outputs
        bounds = [(op, bound) for op, bound in (("max", least), ("min", most)) if bound is not None]
        if (
            out.dtype not in _FLOATS
            or out.dim() > MAX_DIMS
            or any(isinstance(bound, torch.Tensor) for _, bound in bounds)
        ):
            return False
        for place, (op, bound) in enumerate(bounds, start=1):
            made = out if place == len(bounds) else torch.empty(out.shape, dtype=out.dtype, device="meta")
            self._buffer(made, "made", "")
            about = {"op": op, "number": float(bound), "side": "right"}
            self._emit("pointwise", (self._operand(made),), (self._operand(x),), about)
            x = made
        return True

    _concat = _cat

    # ---- Tensors ----

    def _number(self, value: float, like: torch.Tensor) -> Operand:
        """Return a constant of one number, seen in the shape of a tensor."""
        made = torch.empty(1, dtype=like.dtype, device="meta")
        self._buffer(made, "constant", "")
        operand = self._operand(made)
        about = {"op": "aten.full.default", "args": [[1], value], "kwargs": {"dtype": like.dtype}}
        self._setup.append(Instruction("torch", (operand,), (), {**about, "call": torch.ops.aten.full.default}))
        return self._operand(made.expand(like.shape))

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
