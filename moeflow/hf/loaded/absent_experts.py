"""Experts modules whose parameters stay on disk: what would read, change, save, copy or adapt one is refused by name.

The parameters are not on the module: `model.parameters()`, `.to()` and optimizers never see them. Their names lead to a
refusal, and in `state_dict()` stands an `AbsentParameter` for each, since a file without experts looks like a model.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from moeflow.errors import ConfigError
from moeflow.hf.experts_interface import ExpertsModule

_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}  # transformers' classes of experts modules, and ours
_FACTS = "shape dtype device layout requires_grad grad grad_fn is_leaf is_meta is_cpu is_cuda is_sparse ndim nbytes"
_QUESTIONS = "size dim numel nelement element_size stride is_contiguous is_floating_point is_complex __len__ __hash__"
_MAY_BE_ASKED = {getattr(torch.Tensor, name).__get__ for name in _FACTS.split()} | {
    getattr(torch.Tensor, name) for name in _QUESTIONS.split()
}
_SET_TRAINED = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class AbsentParameter(torch.Tensor):
    """Stands for experts' weights on disk: tells shape, dtype and device, and refuses everything else by its name.

    Args:
        name: of the parameter, from the model on.
        parameter: without memory, on the meta device.
    """

    _name: str

    @staticmethod
    def __new__(cls: "type[AbsentParameter]", name: str, parameter: torch.Tensor) -> "AbsentParameter":
        absent = torch.Tensor._make_subclass(cls, parameter.detach(), False)
        absent._name = name
        return absent

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _MAY_BE_ASKED:
            return super().__torch_function__(function, types, args, kwargs or {})
        if function == _SET_TRAINED and not args[1]:
            return None
        given = (*_flat(args), *_flat((kwargs or {}).values()))
        refuse(next((value._name for value in given if isinstance(value, AbsentParameter)), "a routed expert"))

    def detach(self) -> "AbsentParameter":
        """Return this one: `state_dict()` asks so."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "AbsentParameter":
        """Refuse to train it; that it is not trained may be said."""
        if requires_grad:
            refuse(self._name)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentParameter({self._name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> NoReturn:
        refuse(self._name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse(self._name)


def refuse(name: str) -> NoReturn:
    """Refuse whatever was to be done with an expert parameter.

    Raises:
        ConfigError: always; it says what may be done instead.
    """
    raise ConfigError(
        f"{name} is not in memory: load_moe leaves routed experts on disk, and they cannot be read, changed, trained, "
        "copied, saved or given an adapter here. To save the model copy its checkpoint folder, or use moeflow pack or "
        "moeflow quantize; give adapters targets outside of experts, to a model loaded anew; for all else "
        "load it with AutoModelForCausalLM.from_pretrained."
    )


def run_experts_by(path: str, module: ExpertsModule, run: Callable[..., torch.Tensor]) -> None:
    """Let an experts module call `run`, whatever its config says: without parameters it cannot compute itself.

    Args:
        path: of the module in the model.
        module: its parameters taken off.
        run: called with hidden_states [T, H], top_k_index [T, K] and top_k_weights [T, K]; returns [T, H].
    """
    kept = {name: value for name, value in vars(module).items() if isinstance(value, torch.nn.Parameter)}
    for name in kept:
        del module.__dict__[name]
    module._moeflow = run
    module._absent = {name: AbsentParameter(f"{path}.{name}", value) for name, value in kept.items()}
    kind = type(module), tuple(kept)
    if kind not in _CLASSES:
        refusals = {name: property(_refusal(name), _refusal(name)) for name in kept}
        _CLASSES[kind] = type(kind[0].__name__, (_AbsentExperts, kind[0]), refusals)
    module.__class__ = _CLASSES[kind]


class _AbsentExperts(torch.nn.Module):
    """What transformers' class of experts becomes."""

    _moeflow: Callable[..., torch.Tensor]
    _absent: dict[str, AbsentParameter]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self._moeflow(hidden_states, top_k_index, top_k_weights)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Also yield the absent ones, to who asks this module alone: PEFT looks for its targets so."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for name, absent in self._absent.items():
            yield f"{prefix}.{name}" if prefix else name, absent  # type: ignore[misc]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: absent for name, absent in self._absent.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {prefix + name: absent for name, absent in self._absent.items()}
        for name, value in state_dict.items():
            if name in own and not isinstance(value, AbsentParameter):
                refuse(own[name]._name)
            child, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and rest and child not in self._modules:  # an adapter's, or of one expert
                refuse(f"{first_name(self).rpartition('.')[0]}.{child}.{rest}")
        super()._load_from_state_dict(  # type: ignore[misc]
            {name: value for name, value in state_dict.items() if name not in own}, prefix, *args
        )

    def __deepcopy__(self, memo: dict) -> NoReturn:
        refuse(first_name(self))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse(first_name(self))


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refused(module: _AbsentExperts, *value: object) -> NoReturn:
        refuse(module._absent[name]._name)

    return refused


def first_name(module: Any) -> str:
    """Return the first absent parameter of an experts module, by its name from the model on."""
    return next(iter(module._absent.values()))._name


def _flat(values: Any) -> Iterator[object]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
