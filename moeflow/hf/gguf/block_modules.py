"""Dense matrices of a model on the CPU that stay in the blocks of their GGUF file: linears, and embeddings.

Few tokens are multiplied straight from the blocks; many by torch, with a matrix that is unpacked for the call.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moeflow.errors import ConfigError
from moeflow.hf.dense_kernels import MAX_TOKENS
from moeflow.kernels.cpu.blocks import block_linear, block_rows
from moeflow.kernels.cpu.checks import refusal
from moeflow.kernels.quantization.ggml_values import block_values

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define("block_linear(Tensor x, Tensor blocks, str format, Tensor? bias) -> Tensor")
_LIBRARY.define("block_rows(Tensor ids, Tensor blocks, str format, int in_features, ScalarType dtype) -> Tensor")
_LIBRARY.define("block_weight(Tensor blocks, str format, int in_features, ScalarType dtype) -> Tensor")


def _linear_op(x: torch.Tensor, blocks: torch.Tensor, format: str, bias: torch.Tensor | None) -> torch.Tensor:
    out = block_linear(x, blocks, format, bias)
    if out is None:
        raise refusal("a linear in blocks", "x [..., K] in float32, bfloat16 or float16", x, blocks, bias)
    return out


def _weight_op(blocks: torch.Tensor, format: str, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(blocks), in_features, dtype=dtype)
    for begin in range(0, len(blocks), _ROWS_AT_ONCE):
        out[begin : begin + _ROWS_AT_ONCE] = block_values(blocks[begin : begin + _ROWS_AT_ONCE], format)
    return out


_ROWS_AT_ONCE = 512  # in float32 on the way

_LIBRARY.impl("block_linear", _linear_op, "CPU")
_LIBRARY.impl("block_rows", block_rows, "CPU")
_LIBRARY.impl("block_weight", _weight_op, "CPU")


@torch.library.register_fake("moeflow::block_linear")
def _(x: torch.Tensor, blocks: torch.Tensor, format: str, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], blocks.shape[0])


@torch.library.register_fake("moeflow::block_rows")
def _(ids: torch.Tensor, blocks: torch.Tensor, format: str, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return blocks.new_empty(*ids.shape, in_features, dtype=dtype)


@torch.library.register_fake("moeflow::block_weight")
def _(blocks: torch.Tensor, format: str, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return blocks.new_empty(blocks.shape[0], in_features, dtype=dtype)


_FIXED = (
    "is kept in the blocks of its GGUF file, which cannot be changed. To change weights, or to merge an adapter into "
    "them, load a float checkpoint of the model."
)
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_DATA = {torch.Tensor.data.__get__, torch.Tensor.detach}  # type: ignore[attr-defined]


class _Read(torch.Tensor):
    """A weight that was unpacked for who asked: what would change it in place is refused, for it would be lost."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
        if args and isinstance(args[0], cls) and (function == _SET_DATA or (in_place and name != "requires_grad_")):
            raise ConfigError(f"a weight {_FIXED}")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            return found.as_subclass(cls if function in _DATA else torch.Tensor)
        return found


class _Stored(torch.nn.Module):
    """A module whose weight [N, K] is unpacked where it is asked for; state dicts have it as others have."""

    blocks: torch.Tensor
    format: str
    dtype: torch.dtype

    @property
    def _num_columns(self) -> int:
        raise NotImplementedError

    def _unpacked(self) -> torch.Tensor:
        return torch.ops.moeflow.block_weight(self.blocks, self.format, self._num_columns, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to()`, `.float()` and their like: blocks stay, and the dtype that is computed in changes."""
        self.__dict__["dtype"] = fn(torch.empty(0, dtype=self.dtype, device=self.blocks.device)).dtype
        return super()._apply(fn, recurse)

    def _read(self) -> torch.Tensor:
        found = self._unpacked()
        return found if torch.compiler.is_compiling() else found.as_subclass(_Read)

    weight: Any = property(_read)  # [N, K], in memory of its own

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._unpacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise ConfigError(f"{prefix}weight {_FIXED}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class BlockLinear(_Stored, torch.nn.Linear):
    """A linear whose weight is kept in blocks."""

    @property
    def _num_columns(self) -> int:
        return self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] times the weight [N, K], and the bias."""
        is_few = torch.compiler.is_exporting() or 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        is_plain = not (torch.is_grad_enabled() and x.requires_grad) and not torch.is_autocast_enabled("cpu")
        if is_few and is_plain and x.dtype == self.dtype and x.shape[-1] == self.in_features:
            if torch.compiler.is_compiling():
                return torch.ops.moeflow.block_linear(x, self.blocks, self.format, self.bias)
            out = block_linear(x, self.blocks, self.format, self.bias)
            if out is not None:
                return out
        return F.linear(x, self._unpacked(), self.bias)


class BlockEmbedding(_Stored, torch.nn.Embedding):
    """An embedding whose rows are unpacked from blocks."""

    @property
    def _num_columns(self) -> int:
        return self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids, [..., K]."""
        return torch.ops.moeflow.block_rows(ids, self.blocks, self.format, self.embedding_dim, self.dtype)


def keep_in_blocks(module: torch.nn.Module, blocks: torch.Tensor, format: str, dtype: torch.dtype) -> None:
    """Give a linear or an embedding, whose weight was taken off, blocks in its place.

    Args:
        module: a torch.nn.Linear or Embedding.
        blocks: uint8 [N, bytes of a row].
        format: of the blocks.
        dtype: that the module computes in.
    """
    module.__dict__.pop("weight", None)
    kind: type = BlockEmbedding if isinstance(module, torch.nn.Embedding) else BlockLinear
    module.__class__ = kind
    module.register_buffer("blocks", blocks, persistent=False)
    module.__dict__.update(format=format, dtype=dtype)
