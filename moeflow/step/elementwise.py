"""Kinds of torch's operations: elementwise ones as a step program has them, and those that read no values."""

from typing import Any

import torch

_ONE = {
    "neg": "neg", "abs": "abs", "sqrt": "sqrt", "rsqrt": "rsqrt", "reciprocal": "reciprocal", "exp": "exp",
    "log": "log", "sin": "sin", "cos": "cos", "tanh": "tanh", "sigmoid": "sigmoid", "silu": "silu", "relu": "relu",
    "clone": "copy", "_to_copy": "copy", "contiguous": "copy", "logical_not": "not",
    "lift_fresh_copy": "copy",
}  # fmt: skip
_TWO = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "maximum": "max", "minimum": "min", "pow": "pow",
    "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "logical_and": "and", "logical_or": "or",
}  # fmt: skip

FILLED = {
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "arange", "scalar_tensor",
}  # fmt: skip
"""Operations whose result does not depend on what their inputs hold."""

Found = tuple[str, list[torch.Tensor], dict[str, Any]]


def elementwise(name: str, made: torch.Tensor, args: list, kwargs: dict[str, Any]) -> Found | None:
    """Return the operation of a program, the tensors that it reads, and its attributes; None where it is no such.

    Args:
        name: of torch's operation, without its overload.
        made: what it returns, on the meta device.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    if name in _ONE:
        return _ONE[name], [args[0]], {}
    if name == "copy":
        return "copy", [args[1]], {}
    if name == "gelu":
        tanh = kwargs.get("approximate", args[1] if len(args) > 1 else "none") == "tanh"
        return ("gelu_tanh" if tanh else "gelu"), [args[0]], {}
    if name == "softplus" and len(args) == 1:
        return "softplus", [args[0]], {}
    if name == "bitwise_not" and made.dtype is torch.bool:
        return "not", [args[0]], {}
    if name in ("bitwise_and", "bitwise_or", "__and__", "__or__") and made.dtype is torch.bool:
        return name.removeprefix("bitwise_").strip("_"), args[:2], {}
    if name == "square":
        return "mul", [args[0], args[0]], {}
    if name in _TWO and not kwargs.get("rounding_mode"):
        return _pair(_TWO[name], args, kwargs)
    if name == "rsub":
        return _pair("sub", [args[1], args[0]], kwargs)
    if name == "where" and len(args) == 3 and all(isinstance(given, torch.Tensor) for given in args):
        return "where", args, {}
    return None


def _pair(op: str, args: list, kwargs: dict[str, Any]) -> Found | None:
    a, b = args[:2]
    alpha = kwargs.get("alpha", 1)
    tensors = [given for given in (a, b) if isinstance(given, torch.Tensor)]
    if torch.int64 in [tensor.dtype for tensor in tensors] and len(tensors) == 2:
        return None
    attributes: dict[str, Any] = {} if alpha == 1 else {"factor": float(alpha)}
    if len(tensors) == 2:
        return op, tensors, attributes
    if isinstance(a, torch.Tensor):
        return op, [a], {"number": float(b), "side": "right", **attributes}
    return op, [b], {"number": float(a), "side": "left", **attributes}
