"""A step program: instructions over tensors in buffers, as data that can be printed, kept and bound to memory."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moeflow.hf.passes.kept_state import StateName

KINDS = (
    "linear", "rms_norm", "experts", "attend", "pointwise", "softmax", "top_k", "reduce", "gather", "rows", "scatter",
    "attend_latent", "add_norm", "rope", "torch", "own",
)  # fmt: skip
"""Kinds of instructions, in the order of StepKind in _step.h."""

POINTWISE = (
    "copy", "add", "sub", "mul", "div", "max", "min", "pow", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log",
    "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "softplus", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "not", "where",
)  # fmt: skip
"""Elementwise operations, in the order of PointwiseOp in _step.h."""

REDUCTIONS = ("sum", "mean", "max", "min")
STORED = (torch.uint8, torch.uint16)
"""Dtypes of what a lossless matrix and GGML's blocks are stored in; only `linear` and `rows` read them."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
"""Dtypes of tensors, in the order of StepDtype in _step.h."""


@dataclass(frozen=True)
class Buffer:
    """Memory that tensors lie in.

    Args:
        kind: "input" (written before a step), "weight" (of the model), "literal" (a tensor in the model's code),
            "constant" (made once of weights), "made" (in the step), "kept" (made in the step, and read after it) or
            "state" (of a cache: read, and written at the end of the step).
        name: of an input, or of a weight among the model's parameters and buffers.
        num_bytes: its size.
    """

    kind: str
    name: str
    num_bytes: int


@dataclass(frozen=True)
class Operand:
    """A tensor in a buffer; strides and offset in elements."""

    buffer: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in their order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def view(self, sizes: tuple[int, ...]) -> "Operand":
        """Return the same elements of a contiguous tensor in another shape."""
        assert self.is_contiguous, self
        assert math.prod(sizes) == math.prod(self.sizes), (self, sizes)
        strides = tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))
        return Operand(self.buffer, self.dtype, sizes, strides, self.offset)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        kind: of `KINDS`.
        outputs: tensors that it writes.
        inputs: tensors that it reads.
        attributes: what else it needs; "formats" of matrices in GGML's blocks; of a "torch" instruction, "op" and its
            arguments with operands among them; of an "own" instruction, "call" and its number.
    """

    kind: str
    outputs: tuple[Operand, ...]
    inputs: tuple[Operand, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


class Residual(NamedTuple):
    """The residual stream in front of a layer's experts.

    Args:
        norm: the path of the norm that feeds them, in the model.
        stream: the norm's input, [num_rows, ..., H]; it stays until the next step.
    """

    norm: str
    stream: Operand


@dataclass
class Program:
    """A decode step of `num_rows` sequences.

    Args:
        num_rows: sequences, one new token each.
        buffers: what its tensors lie in.
        setup: run once, when the program is bound: what is made of weights alone.
        body: run each step.
        logits: [num_rows, 1, V].
        residuals: of MoE layers, by number, for predictors and recorders; without the layers that have none.
        literals: tensors that the model's code made itself, by name.
        states: what a cache keeps beside keys and values, each in a buffer of its own.
        state_names: which they are.
    """

    num_rows: int
    buffers: list[Buffer]
    setup: list[Instruction]
    body: list[Instruction]
    logits: Operand
    residuals: dict[int, Residual] = field(default_factory=dict)
    literals: dict[str, torch.Tensor] = field(default_factory=dict)
    states: list[Operand] = field(default_factory=list)
    state_names: list[StateName] = field(default_factory=list)

    @property
    def last_hidden(self) -> Operand | None:
        """What the last norm made, and the head made the logits of: [num_rows, ..., H]; None where they differ."""
        norm = next((one for one in reversed(self.body) if one.kind in ("rms_norm", "add_norm")), None)
        head = next((one for one in reversed(self.body) if one.kind == "linear"), None)
        if norm is None or head is None:
            return None
        made, read = norm.outputs[-1], head.inputs[0]
        same = made.is_contiguous and (made.buffer, made.offset) == (read.buffer, read.offset)
        return made if same and math.prod(made.sizes) == math.prod(read.sizes) else None

    def text(self) -> str:
        """Return the program as lines, one an instruction."""
        lines = [f"{self.num_rows} rows, {len(self.buffers)} buffers, {len(self.body)} instructions"]
        for number, instruction in enumerate(self.body):
            outputs = ", ".join(map(self._name, instruction.outputs))
            inputs = ", ".join(map(self._name, instruction.inputs))
            attributes = " ".join(f"{name}={value}" for name, value in instruction.attributes.items())
            lines.append(f"{number:5} {outputs} = {instruction.kind} {inputs} {attributes}".rstrip())
        return "\n".join(lines)

    def _name(self, operand: Operand) -> str:
        buffer = self.buffers[operand.buffer]
        dtype = str(operand.dtype).removeprefix("torch.")
        place = f"+{operand.offset}" if operand.offset else ""
        return f"{buffer.name or f'%{operand.buffer}'}{place}:{dtype}{list(operand.sizes)}"
