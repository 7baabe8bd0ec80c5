"""Dense matrices of a model on the CPU that stay in the blocks of their GGUF file: linears, and embeddings.

Tokens are multiplied straight from the blocks. Where no kernel takes them, with gradients, or under autocast, torch
multiplies with a matrix that is unpacked for the call.
"""

import torch
import torch.nn.functional as F

from moeflow.hf.dense_kernels import StoredWeight
from moeflow.kernels.cpu.blocks import block_linear, block_rows

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define("block_linear(Tensor x, Tensor blocks, str format, Tensor? bias) -> Tensor")
_LIBRARY.define("block_rows(Tensor ids, Tensor blocks, str format, int in_features, ScalarType dtype) -> Tensor")
_LIBRARY.define("block_weight(Tensor blocks, str format, int in_features, ScalarType dtype) -> Tensor")


def _linear_op(x: torch.Tensor, blocks: torch.Tensor, format: str, bias: torch.Tensor | None) -> torch.Tensor:
    out = block_linear(x, blocks, format, bias)
    return F.linear(x, _weight_op(blocks, format, x.shape[-1], x.dtype), bias) if out is None else out


def _weight_op(blocks: torch.Tensor, format: str, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(blocks), in_features, dtype=dtype)
    for begin in range(0, len(blocks), _ROWS_AT_ONCE):
        ids = torch.arange(begin, min(begin + _ROWS_AT_ONCE, len(blocks)))
        out[begin : begin + _ROWS_AT_ONCE] = block_rows(ids, blocks, format, in_features, dtype)
    return out


_ROWS_AT_ONCE = 512  # types without a kernel are in float32 on the way

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


class _Stored(StoredWeight):
    """A module whose weight [N, K] is kept in blocks."""

    blocks: torch.Tensor
    format: str
    kept_in = "the blocks of its GGUF file"
    instead = "load a float checkpoint of the model"

    @property
    def _num_columns(self) -> int:
        raise NotImplementedError

    def unpacked(self) -> torch.Tensor:
        return torch.ops.moeflow.block_weight(self.blocks, self.format, self._num_columns, self.dtype)


class BlockLinear(_Stored, torch.nn.Linear):
    """A linear whose weight is kept in blocks."""

    @property
    def _num_columns(self) -> int:
        return self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] times the weight [N, K], and the bias."""
        is_plain = not (torch.is_grad_enabled() and x.requires_grad) and not torch.is_autocast_enabled("cpu")
        if is_plain and x.dtype == self.dtype and x.shape[-1] == self.in_features:
            if torch.compiler.is_compiling():
                return torch.ops.moeflow.block_linear(x, self.blocks, self.format, self.bias)
            out = block_linear(x, self.blocks, self.format, self.bias)
            if out is not None:
                return out
        return F.linear(x, self.unpacked(), self.bias)


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
