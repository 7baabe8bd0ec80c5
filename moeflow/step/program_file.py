"""Programs as files: JSON with its own checksum, written whole or not at all, checked before anything in it is used.

A file holds the program of one model as lowering wrote it, or why the model has none.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from moeflow.atomic_file import NO_CHECKSUM, is_sealed, seal, write_atomically
from moeflow.hf.passes.kept_state import StateName
from moeflow.hf.passes.own_modules import Given, OwnCall
from moeflow.step.program import Buffer, Instruction, Operand, Program, Residual
from moeflow.step.sound import check_sound

FORMAT = 1
_MOST_BYTES = 1 << 28  # of a file
_PLAIN = (type(None), bool, int, float, str)
_UNDERSCORED = {
    "_softmax",
    "_log_softmax",
    "_to_copy",
    "_unsafe_view",
    "__or__",
    "__and__",
    "__xor__",
}  # that check what they get
_OF_OURS = {
    f"moeflow.{name}.default"
    for name in (
        "linear",
        "rms_norm",
        "lossless_linear",
        "lossless_rows",
        "lossless_weight",
        "block_linear",
        "block_rows",
        "block_weight",
    )
}


class KeptProgram(NamedTuple):
    """What a file tells of a model.

    Args:
        program: that agrees with the model's own code; None where there is none.
        reason: why there is none.
    """

    program: Program | None
    reason: str | None


def write_program(path: Path, key: str, kept: KeptProgram) -> None:
    """Write a file; other processes see all of it or nothing.

    Args:
        path: the file, in a folder that may not exist yet.
        key: of what the program was captured from.
        kept: what it tells.

    Raises:
        OSError: it cannot be written.
        TypeError: an argument of a torch operation has no form in a file.
    """
    about = {"format": FORMAT, "key": key, "crc32": NO_CHECKSUM, "reason": kept.reason, "program": None}
    if kept.program is not None:
        about["program"] = _program_as_json(kept.program)
    content = seal(json.dumps(about, separators=(",", ":")).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, error=None)


def read_program(path: Path, key: str, weights: Mapping[str, torch.Tensor], num_moe_layers: int) -> KeptProgram | None:
    """Read a file; None where there is none, or it is damaged, of something else, or could do harm.

    Args:
        path: the file.
        key: of what the program must have been captured from.
        weights: the model's parameters and buffers, by name.
        num_moe_layers: of the model.
    """
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES)
        if not is_sealed(content):
            return None
        about = json.loads(content)
        if about["format"] != FORMAT or about["key"] != key:
            return None
        if about["program"] is None:
            return KeptProgram(None, about["reason"]) if isinstance(about["reason"], str) else None
        program = _program_of_json(about["program"])
        check_sound(program, weights, num_moe_layers)
        return KeptProgram(program, None)
    except Exception:  # whatever a file of a stranger's makes of it: it is written anew
        return None


# ---- To JSON ----


def _program_as_json(program: Program) -> dict[str, Any]:
    return {
        "num_rows": program.num_rows,
        "buffers": [[one.kind, one.name, one.num_bytes] for one in program.buffers],
        "setup": [_instruction_as_json(one) for one in program.setup],
        "body": [_instruction_as_json(one) for one in program.body],
        "logits": _operand_as_json(program.logits),
        "residuals": [[layer, one.norm, _operand_as_json(one.stream)] for layer, one in program.residuals.items()],
        "literals": {name: _literal_as_json(one) for name, one in program.literals.items()},
        "states": [_operand_as_json(one) for one in program.states],
        "state_names": [list(one) for one in program.state_names],
    }


def _instruction_as_json(one: Instruction) -> list[Any]:
    is_torch = one.kind == "torch"  # its inputs are among its arguments, and its name tells what is called
    about = {name: value for name, value in one.attributes.items() if not (is_torch and name == "call")}
    outputs, inputs = ([_operand_as_json(tensor) for tensor in part] for part in (one.outputs, one.inputs))
    return [one.kind, outputs, [] if is_torch else inputs, _as_json(about)]


def _operand_as_json(one: Operand) -> list[Any]:
    return [one.buffer, _name(one.dtype), list(one.sizes), list(one.strides), one.offset]


def _literal_as_json(literal: torch.Tensor) -> dict[str, str]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(literal.shape, literal.stride(), strict=True))
    flat = literal.detach().as_strided((extent if literal.numel() else 0,), (1,))
    values = flat.contiguous().view(torch.uint8).numpy().tobytes()
    return {"dtype": _name(literal.dtype), "values": base64.b64encode(values).decode()}


def _as_json(value: Any) -> Any:
    """Write an argument: lists and plain values as they are, others as an object of one field, named by the type."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (OwnCall, Given)):
        return {"own" if isinstance(value, OwnCall) else "given": [_as_json(one) for one in value]}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    if isinstance(value, dict):
        return {"dict": {name: _as_json(one) for name, one in value.items()}}
    if isinstance(value, Operand):
        return {"operand": _operand_as_json(value)}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: _name(value)}
    raise TypeError(f"a {type(value).__name__} in a program has no form in a file")


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


# ---- And back ----


def _program_of_json(about: dict[str, Any]) -> Program:
    buffers = [Buffer(str(kind), str(name), _whole(size)) for kind, name, size in about["buffers"]]
    setup, body = ([_instruction_of_json(one) for one in about[part]] for part in ("setup", "body"))
    literals = {name: _literal_of_json(one) for name, one in about["literals"].items()}
    names = [StateName(_whole(layer), str(kind), _whole(place)) for layer, kind, place in about["state_names"]]
    residuals = {
        _whole(layer): Residual(str(norm), _operand_of_json(stream)) for layer, norm, stream in about["residuals"]
    }
    return Program(
        num_rows=_whole(about["num_rows"]),
        buffers=buffers,
        setup=setup,
        body=body,
        logits=_operand_of_json(about["logits"]),
        residuals=residuals,
        literals=literals,
        states=[_operand_of_json(one) for one in about["states"]],
        state_names=names,
    )


def _instruction_of_json(one: list[Any]) -> Instruction:
    kind, outputs, inputs, attributes = one
    about = _of_json(attributes)
    if kind == "torch":
        about = {"op": about["op"], "args": about["args"], "kwargs": about["kwargs"], "call": _operation(about["op"])}
        inputs = [leaf for leaf in pytree.tree_leaves((about["args"], about["kwargs"])) if isinstance(leaf, Operand)]
    else:
        inputs = [_operand_of_json(operand) for operand in inputs]
    return Instruction(kind, tuple(map(_operand_of_json, outputs)), tuple(inputs), about)


def _operand_of_json(one: list[Any]) -> Operand:
    buffer, dtype, sizes, strides, offset = one
    return Operand(
        _whole(buffer), _named("dtype", dtype), tuple(map(_whole, sizes)), tuple(map(_whole, strides)), _whole(offset)
    )


def _literal_of_json(one: dict[str, str]) -> torch.Tensor:
    values = np.frombuffer(bytearray(base64.b64decode(one["values"], validate=True)), np.uint8)
    return torch.from_numpy(values).view(_named("dtype", one["dtype"]))


def _of_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_of_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((name, held),) = value.items()
    if name == "dict":
        return {key: _of_json(one) for key, one in held.items()}
    if name in ("own", "given"):
        return (OwnCall if name == "own" else Given)(*map(_of_json, held))
    return _operand_of_json(held) if name == "operand" else _named(name, held)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError(f"{value!r} is no size")
    return value


_NAMED = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def _named(kind: str, name: str) -> Any:
    """Return torch's object of a kind and a name."""
    if kind == "device":
        return torch.device("cpu")  # programs run nowhere else
    found = getattr(torch, name)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"torch has no {kind} {name}")
    return found


def _operation(name: str) -> Any:
    """Return an operation of torch's that a program may call: one that makes new tensors of its arguments alone."""
    space, operation, overload = name.split(".")
    is_open = space == "aten" and (not operation.startswith("_") or operation in _UNDERSCORED)
    if not is_open and name not in _OF_OURS:
        raise ValueError(f"{name} is not for programs")
    found = getattr(getattr(getattr(torch.ops, space), operation), overload)
    if found._schema.is_mutable or operation == "from_file":
        raise ValueError(f"{name} is not for programs")
    return found
