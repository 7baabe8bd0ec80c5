"""Dense matrices of a model on the CPU that stay in the lossless format: linears, and the embedding tied to one.

Few tokens are multiplied straight from the codes; many by torch, with a matrix that is unpacked for the call. Both give
the bits that bfloat16 weights give.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moeflow.core import align_up
from moeflow.hf.dense_kernels import FewTokensLinear, StoredWeight
from moeflow.kernels.cpu.ahead import FEW_TOKENS
from moeflow.kernels.cpu.checks import is_plain, refusal
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.lossless import count_escapes, decode, encode, lossless_linear, lossless_rows
from moeflow.kernels.cpu.ops import linear
from moeflow.kernels.quantization.formats import MOST_LOSSLESS_VALUES, lossless_format

_MOST_SIZE = 0.9  # of the bytes in bfloat16: a matrix that takes more stays
_MOST_ESCAPES = 1 / 1024  # of the values: beyond it a product takes longer than from bfloat16
_ROOM = 16  # escapes that room is made for at once

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_MATRIX = "Tensor codes, Tensor tops, Tensor escapes"
_LIBRARY.define(f"lossless_linear(Tensor x, {_MATRIX}, Tensor? bias) -> Tensor")
_LIBRARY.define(f"lossless_rows(Tensor ids, {_MATRIX}, int in_features) -> Tensor")
_LIBRARY.define(f"lossless_weight({_MATRIX}, int in_features) -> Tensor")


def _linear_op(x: torch.Tensor, codes: torch.Tensor, *parts: Any) -> torch.Tensor:
    out = lossless_linear(x, codes, *parts)
    if out is None:
        raise refusal("a lossless linear", "x [..., K] in bfloat16", x, codes, *parts)
    return out


def _weight_op(codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, in_features: int) -> torch.Tensor:
    out = torch.empty(len(tops), in_features, dtype=torch.bfloat16)
    decode(codes, tops, escapes, (len(tops), in_features), out)
    return out


_LIBRARY.impl("lossless_linear", _linear_op, "CPU")
_LIBRARY.impl("lossless_rows", lossless_rows, "CPU")
_LIBRARY.impl("lossless_weight", _weight_op, "CPU")


@torch.library.register_fake("moeflow::lossless_linear")
def _(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("moeflow::lossless_rows")
def _(ids: torch.Tensor, codes: torch.Tensor, tops: Any, escapes: Any, in_features: int) -> torch.Tensor:
    return codes.new_empty(*ids.shape, in_features, dtype=torch.bfloat16)


@torch.library.register_fake("moeflow::lossless_weight")
def _(codes: torch.Tensor, tops: Any, escapes: Any, in_features: int) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], in_features, dtype=torch.bfloat16)


class _Stored(StoredWeight):
    """A module whose weight [N, K] is kept in the lossless format."""

    codes: torch.Tensor
    tops: torch.Tensor
    escapes: torch.Tensor
    kept_in = "the lossless format"
    instead = "load the model without quantization='lossless'"

    @property
    def _num_columns(self) -> int:
        raise NotImplementedError

    def unpacked(self) -> torch.Tensor:
        found = torch.ops.moeflow.lossless_weight(self.codes, self.tops, self.escapes, self._num_columns)
        return found.to(self.dtype)


class LosslessLinear(_Stored, torch.nn.Linear):
    """A linear whose weight is kept in the lossless format."""

    always_in: torch.dtype | None = None  # as of `FewTokensLinear`, which it was

    @property
    def _num_columns(self) -> int:
        return self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] times the weight [N, K], and the bias."""
        is_few = torch.compiler.is_exporting() or 0 < x.numel() <= FEW_TOKENS * x.shape[-1]
        is_plain = not (torch.is_grad_enabled() and x.requires_grad) and not torch.is_autocast_enabled("cpu")
        if is_few and is_plain and x.dtype == torch.bfloat16 and x.shape[-1] == self.in_features:
            if torch.compiler.is_compiling():
                return torch.ops.moeflow.lossless_linear(x, self.codes, self.tops, self.escapes, self.bias)
            out = lossless_linear(x, self.codes, self.tops, self.escapes, self.bias)
            if out is not None:
                return out
        weight = self.unpacked()
        if is_plain and weight.dtype == self.always_in and not torch.compiler.is_compiling():
            out = linear(x, weight, self.bias)  # as a linear that is not stored so
            if out is not None:
                return out
        return F.linear(x, weight, self.bias)


class LosslessEmbedding(_Stored, torch.nn.Embedding):
    """An embedding whose rows are unpacked of the codes that a linear keeps."""

    @property
    def _num_columns(self) -> int:
        return self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids, [..., K]."""
        rows = torch.ops.moeflow.lossless_rows(ids, self.codes, self.tops, self.escapes, self.embedding_dim)
        return rows.to(self.dtype)


@torch.no_grad()
def compress_dense(model: torch.nn.Module) -> int:
    """Keep the weights of a model's linears in the lossless format, one at a time, and give up those in bfloat16.

    Linears that are not moeflow's, have hooks, another dtype or weights that others use stay as they are, and those
    whose record would take more than 0.9 of the weight, or has so many escapes that a step would take longer.

    Args:
        model: after `speed_up_dense`.

    Returns:
        Bytes that are free now.
    """
    if instruction_set() is None:
        return 0
    users: dict[int, list[torch.nn.Module]] = {}
    by_value = {id(one.kv_b_proj) for one in model.modules() if hasattr(one, "expand_kv") and hasattr(one, "kv_b_proj")}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    saved = 0
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if type(module) is FewTokensLinear and weight is not None and id(module) not in by_value:
            together = users[id(weight)]
            if _is_taken(weight) and all(map(_takes, together)):
                saved += _compress(weight, together)
    return saved


def _is_taken(weight: torch.Tensor) -> bool:
    return (
        type(weight) is torch.nn.Parameter
        and weight.dtype == torch.bfloat16
        and is_plain(weight)
        and 0 < weight.numel() <= MOST_LOSSLESS_VALUES
    )


def _takes(module: Any) -> bool:
    """Whether a module's weight may be kept as codes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        return False
    if type(module) is torch.nn.Embedding:
        return module.max_norm is None
    return type(module) is FewTokensLinear and (module.bias is None or module.bias.dtype == torch.bfloat16)


def _compress(weight: torch.Tensor, modules: list[torch.nn.Module]) -> int:
    """Store a weight for its modules and return the bytes that this saves; 0, and it stays, where that is too few."""
    shape = (weight.shape[0], weight.shape[1])
    num_escapes = count_escapes(weight)
    room = max(align_up(num_escapes, _ROOM), _ROOM)
    spec, before = lossless_format(room), weight.nbytes
    if spec.num_bytes(shape) >= _MOST_SIZE * before or num_escapes > max(_MOST_ESCAPES * weight.numel(), _ROOM):
        return 0
    (_, _, size), *_ = spec.tensors("", shape)
    codes, tops = torch.empty(size, dtype=torch.uint8), torch.empty(shape[0], dtype=torch.uint16)
    escapes = torch.empty(5 * room, dtype=torch.uint8)
    encode(weight, codes, tops, escapes)
    for module in modules:
        del module._parameters["weight"]
        module.__class__ = LosslessEmbedding if isinstance(module, torch.nn.Embedding) else LosslessLinear
        for name, part in (("codes", codes), ("tops", tops), ("escapes", escapes)):
            module.register_buffer(name, part, persistent=False)
        module.__dict__["dtype"] = torch.bfloat16
    return before - spec.num_bytes(shape)
