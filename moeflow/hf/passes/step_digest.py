"""Digest of all that a model's captured step depends on: its code, its settings, and which weights it has.

A capture writes the values of Python attributes and the paths that the code takes into the graph. What decides them is
hashed here as it is in this process, so that code that was patched and a setting that was changed give another digest.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

_NOT_OF_THE_STEP = {"name_or_path", "transformers_version"}
_NUM_SAMPLES = 64  # values of a weight that are looked at
_MOST_VALUES = 4096  # of a tensor that is hashed whole: those of rotary embeddings
_DEEPEST = 4  # containers and closures within each other


def step_digest(model: PreTrainedModel) -> str:
    """Hash what a captured step depends on, and samples of the weights.

    Args:
        model: loaded.

    Returns:
        64 hexadecimal digits, the same in every process that would capture the same.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_without_paths(model.config.to_dict()), sort_keys=True, default=str).encode())
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        settings = {name: _settled(value, 0) for name, value in vars(module).items() if name not in _NOT_OF_THE_STEP}
        digest.update(repr((path, kind.__module__, kind.__qualname__, sorted(settings.items()))).encode())
        for function in _functions_beside(kind.forward, seen):
            digest.update(repr(_settled(function, 0)).encode())
    tied: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        about = name, tied.setdefault(id(tensor), name), tuple(tensor.shape), tensor.stride(), str(tensor.dtype)
        digest.update(repr((*about, tensor.device.type)).encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _without_paths(settings: Any) -> Any:
    if isinstance(settings, dict):
        kept = {str(name): value for name, value in settings.items() if name not in _NOT_OF_THE_STEP}
        return {name: _without_paths(value) for name, value in kept.items() if not name.startswith("_")}
    return settings


def _settled(value: Any, depth: int) -> Any:
    """Return what of a Python value a capture may depend on, written alike in every process."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), _sample(value)
    if depth < _DEEPEST:
        if isinstance(value, (list, tuple)):
            return [_settled(one, depth + 1) for one in value]
        if isinstance(value, dict):
            return [(_settled(name, depth + 1), _settled(one, depth + 1)) for name, one in value.items()]
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            held = *cells, value.__defaults__, value.__kwdefaults__
            return _code(value.__code__), [_settled(one, depth + 1) for one in held]
    return type(value).__qualname__


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _code(code: CodeType) -> tuple:
    """Return what a function does, without where it was written."""
    constants = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    held = [sorted(one) if one.startswith("frozenset") else one for one in constants if isinstance(one, str)]
    nested = [one for one in constants if not isinstance(one, str)]
    return code.co_code, code.co_names, code.co_varnames, held, nested


def _functions_beside(forward: Callable, seen: set[int]) -> Iterator[FunctionType]:
    """Yield a module's forward and all functions that its source file sees by a name of its own, each once."""
    while True:
        if isinstance(forward, FunctionType) and id(forward) not in seen:
            seen.add(id(forward))
            yield forward
        if not hasattr(forward, "__wrapped__"):
            break
        forward = forward.__wrapped__
    names = getattr(forward, "__globals__", {})
    home = names.get("__name__", "")
    if id(names) in seen or home.startswith("torch."):
        return
    seen.add(id(names))
    for name, value in [*names.items()]:
        if name.startswith("__"):  # torch.compile leaves what it made of a file there
            continue
        if isinstance(value, type) and value.__module__ == home:
            members = [getattr(one, "__func__", getattr(one, "fget", one)) for one in vars(value).values()]
        else:
            members = [] if isinstance(value, (type, ModuleType)) else [value]
        for member in members:
            for function in (member, inspect.unwrap(member)) if isinstance(member, FunctionType) else ():
                if id(function) not in seen:
                    seen.add(id(function))
                    yield function


def _sample(tensor: torch.Tensor) -> bytes:
    """Return some values of a tensor, all of a small one; none of one whose values are not here."""
    if tensor.device.type != "cpu" or tensor.is_quantized or tensor.layout != torch.strided:
        return b""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    if flat.numel() > _MOST_VALUES:
        flat = flat[:: flat.numel() // _NUM_SAMPLES | 1]  # an odd step meets all bytes of blocks, whose sizes are even
    return flat.contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
