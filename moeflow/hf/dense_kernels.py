"""Dense parts of a model on the CPU: linears and norms that run moeflow's own kernels where torch's are slower.

torch's kernels for one token reach a quarter to a half of the memory's bandwidth, and eager transformers spends more
time between kernels than in them. Many tokens in 16 bits go to torch only where it has instructions for them: without,
its product is five times slower than these kernels. The number of tokens, the dtype and the processor alone decide
which kernel runs, so bits do not depend on a budget. Every call is a torch.library op, so that torch.compile takes the
model whole.
"""

import inspect
import sys
from typing import Any

import torch

from moeflow.errors import ConfigError
from moeflow.kernels.cpu.ahead import FEW_TOKENS, is_always_ahead
from moeflow.kernels.cpu.checks import refusal, takes_linear, takes_norm
from moeflow.kernels.cpu.library import instruction_set
from moeflow.kernels.cpu.ops import linear, rms_norm
from moeflow.kernels.cpu.structs import DTYPES

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")


_PLAIN = (torch.nn.Parameter, torch.Tensor)  # a subclass keeps its values in a way of its own


def _linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = linear(x, weight, bias)
    if out is None:
        raise refusal("a linear", "x [..., K], weight [N, K] and bias [N]", x, weight, bias)
    return out


def _norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = rms_norm(x, weight, eps)
    if out is None:
        raise refusal("a norm", "x [..., H] and weight [H] of its dtype", x, weight)
    return out


_LIBRARY.impl("linear", _linear_op, "CPU")
_LIBRARY.impl("rms_norm", _norm_op, "CPU")


@torch.library.register_fake("moeflow::linear")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _check_device(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("moeflow::rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check_device(x, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_device(x: torch.Tensor, *weights: torch.Tensor | None) -> None:
    """Refuse a weight that was moved away from its input: torch leaves a product unset where one is on "meta"."""
    for weight in weights:
        if weight is not None and weight.device != x.device:
            raise ConfigError(
                f"a weight is on {weight.device}, its input on {x.device}. Do not move parts of a model that load_moe "
                "returned: give load_moe the device instead."
            )


def _suits(x: torch.Tensor, weight: torch.Tensor, most: int = FEW_TOKENS) -> bool:
    """Whether so few tokens are multiplied here, in one dtype as torch asks, without gradients or autocast.

    A captured step takes all its linears and norms as single nodes.
    """
    return (
        (torch.compiler.is_exporting() or 0 < x.numel() <= most * x.shape[-1])
        and x.dtype == weight.dtype
        and (type(weight) in _PLAIN or torch.compiler.is_compiling())
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
    )


class FewTokensLinear(torch.nn.Linear):
    """A torch linear that multiplies few tokens by moeflow's kernel.

    Attributes:
        always_in: dtype of a weight that it multiplies so with any number of tokens; None for none.
    """

    always_in: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        most = sys.maxsize if weight.dtype == self.always_in else FEW_TOKENS
        if _suits(x, weight, most) and (bias is None or bias.dtype == weight.dtype):
            if torch.compiler.is_compiling():
                if takes_linear(x, weight, bias):
                    return torch.ops.moeflow.linear(x, weight, bias)
            elif (out := linear(x, weight, bias)) is not None:
                return out
        _check_device(x, weight, bias)
        return super().forward(x)


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    if _suits(x, weight):
        if torch.compiler.is_compiling():
            if takes_norm(x, weight):
                return torch.ops.moeflow.rms_norm(x, weight, self.variance_epsilon)
        elif (out := rms_norm(x, weight, self.variance_epsilon)) is not None:
            return out
    return self._transformers_forward(x)


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_DATA = {torch.Tensor.data.__get__, torch.Tensor.detach}  # type: ignore[attr-defined]


class _Read(torch.Tensor):
    """A weight that was unpacked for who asked: what would change it in place is refused, for it would be lost."""

    fixed: str

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
        if args and isinstance(args[0], cls) and (function == _SET_DATA or (in_place and name != "requires_grad_")):
            raise ConfigError(f"a weight {args[0].fixed}")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if not isinstance(found, torch.Tensor):
            return found
        return _read(found, args[0].fixed) if function in _DATA else found.as_subclass(torch.Tensor)


def _read(weight: torch.Tensor, fixed: str) -> torch.Tensor:
    found = weight.as_subclass(_Read)
    found.fixed = fixed
    return found


class StoredWeight(torch.nn.Module):
    """A module whose weight [N, K] is kept in another form, and unpacked where it is asked for.

    State dicts have the weight as others have it.

    Attributes:
        dtype: that the module computes in.
        kept_in: what the weight is kept in, and `instead` what to do to change it, for errors.
    """

    dtype: torch.dtype
    kept_in: str
    instead: str

    def unpacked(self) -> torch.Tensor:
        """Return the weight in memory of its own, [N, K], in the module's dtype."""
        raise NotImplementedError

    @property
    def _fixed(self) -> str:
        return (
            f"is kept in {self.kept_in}, which cannot be changed. To change weights, or to merge an adapter into them, "
            f"{self.instead}."
        )

    def _weight(self) -> torch.Tensor:
        found = self.unpacked()
        return found if torch.compiler.is_compiling() else _read(found, self._fixed)

    weight: Any = property(_weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to()`, `.float()` and their like: what is kept stays, and the dtype that is computed in changes."""
        device = next(self.buffers()).device
        self.__dict__["dtype"] = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.unpacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise ConfigError(f"{prefix}weight {self._fixed}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch.no_grad()
def speed_up_dense(model: torch.nn.Module) -> None:
    """Give a model on the CPU moeflow's linears and norms; other modules stay as they are.

    Args:
        model: whose modules get another class.
    """
    if instruction_set() is None:
        return
    norms: dict[type, type] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")  # a stored one is no parameter, and is not unpacked to be looked at
        if not isinstance(weight, torch.nn.Parameter) or weight.device.type != "cpu" or weight.dtype not in DTYPES:
            continue
        if type(module) is torch.nn.Linear:
            module.__class__ = FewTokensLinear
            vars(module)["always_in"] = weight.dtype if is_always_ahead(weight.dtype) else None
        elif hasattr(module, "variance_epsilon") and _is_known_norm(module):
            kind = type(module)
            if hasattr(kind, "_transformers_forward"):  # of a class that was made here before
                continue
            if kind not in norms:
                body = {"forward": _norm_forward, "_transformers_forward": kind.forward}
                norms[kind] = type(kind.__name__, (kind,), body)
            module.__class__ = norms[kind]


def _is_known_norm(module: Any) -> bool:
    """Whether a norm computes what `rms_norm` does, bit for bit, on a sample."""
    if module.weight.dim() != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return False  # those with a gate take two
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, module.weight.shape[0], generator=generator).to(module.weight.dtype)
    found = rms_norm(sample, module.weight, module.variance_epsilon)
    return found is not None and torch.equal(module(sample), found)
