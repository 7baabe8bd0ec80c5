"""A step program bound to a model's weights and to memory: instructions at fixed addresses."""

import math
from typing import Any

import numpy as np
import torch

from moeflow.core import align_up
from moeflow.hf.passes.caches.growing_cache import KeptShape
from moeflow.kernels.cpu.huge_pages import use_huge_pages
from moeflow.kernels.cpu.step import MAX_DIMS, StepCode, instruction_words, tensor_words
from moeflow.kernels.cpu.structs import block_number
from moeflow.step.program import DTYPES, KINDS, POINTWISE, REDUCTIONS, STORED, Instruction, Operand, Program

_ELSEWHERE = KINDS.index("torch")
_ALIGN_BYTES = 64


class BoundProgram:
    """A program's tensors in memory.

    Args:
        program: the program.
        model: whose weights it names.

    Attributes:
        num_bytes: of memory that is taken beside the weights.
        logits: of the last step, [num_rows, 1, V].
        last_hidden: what the head made them of, [num_rows, ..., H]; None where the program tells none.
    """

    def __init__(self, program: Program, model: torch.nn.Module) -> None:
        self.program = program
        calls = [one.attributes["call"] for one in program.body if one.kind == "own"]
        self.modules = {call.path: model.get_submodule(call.path) for call in calls}
        offsets, self.num_bytes = plan_memory(program)
        self._arena = torch.zeros(self.num_bytes + 64, dtype=torch.uint8)
        begin = -self._arena.data_ptr() % 64
        named = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._raw: list[torch.Tensor] = []  # of each buffer, its bytes, or the weight
        for buffer, offset in zip(program.buffers, offsets, strict=True):
            if buffer.kind == "weight":
                self._raw.append(named[buffer.name].detach())
            elif buffer.kind == "literal":
                self._raw.append(program.literals[buffer.name].detach())
            elif buffer.kind == "state":
                self._raw.append(torch.zeros(buffer.num_bytes, dtype=torch.uint8))
            elif offset is None:
                self._raw.append(torch.empty(0, dtype=torch.uint8))
            else:
                self._raw.append(self._arena[begin + offset : begin + offset + buffer.num_bytes])
        self.compute_constants()
        matrices = {operand.buffer for one in program.body if one.kind == "linear" for operand in one.inputs[1:]}
        use_huge_pages([(raw.data_ptr(), raw.nbytes) for raw in map(self._raw.__getitem__, sorted(matrices))])
        self.kept_layers: dict[int, KeptShape] = {}  # by number of the layer, in the order of the library's table
        for one in program.body:
            if one.kind in ("attend", "attend_latent"):
                key, value = one.inputs[1:3]
                shape = KeptShape(key.sizes[1], key.sizes[3], value.sizes[3], key.dtype)
                self.kept_layers[one.attributes["layer"]] = shape
        self._kept_places = {layer: place for place, layer in enumerate(self.kept_layers)}
        self.code = StepCode([self._words(instruction) for instruction in program.body])
        self.inputs = {
            buffer.name: self._raw[number].view(torch.int64)
            for number, buffer in enumerate(program.buffers)
            if buffer.kind == "input"
        }
        self.logits = self.tensor(program.logits)
        self.last_hidden = None if (hidden := program.last_hidden) is None else self.tensor(hidden)
        self._residuals = {
            layer: (model.get_submodule(found.norm), self.tensor(found.stream))
            for layer, found in program.residuals.items()
        }
        states = {state.buffer for state in program.states}
        self._of_states = [
            number
            for number, one in enumerate(program.body)
            if any(operand.buffer in states for operand in (*one.outputs, *one.inputs))
        ]

    def takes(self, states: list[torch.Tensor] | None) -> bool:
        """Whether states are those of the program, by size and dtype."""
        if states is None:
            return False
        return all(
            tuple(found.shape) == state.sizes and found.dtype == state.dtype
            for found, state in zip(states, self.program.states, strict=True)
        )

    def use_states(self, states: list[torch.Tensor]) -> None:
        """Let instructions read and write states where they lie."""
        raw = self._raw
        if all(raw[s.buffer].data_ptr() == t.data_ptr() for s, t in zip(self.program.states, states, strict=True)):
            return
        for state, tensor in zip(self.program.states, states, strict=True):
            raw[state.buffer] = tensor.detach()
        for number in self._of_states:
            self.code.replace(number, self._words(self.program.body[number]))

    def compute_constants(self) -> None:
        """Compute what is made of weights alone, again where they may have been changed in place."""
        for instruction in self.program.setup:
            self.call(instruction)

    def tensor(self, operand: Operand) -> torch.Tensor:
        """Return an operand where it lies."""
        raw = self._raw[operand.buffer]
        flat = raw if raw.dtype == operand.dtype else raw.view(operand.dtype)
        return torch.as_strided(flat, operand.sizes, operand.strides, flat.storage_offset() + operand.offset)

    def show_residual(self, layer: int, hidden_states: torch.Tensor) -> None:
        """Show the taps at a layer's norm what it would have shown them by its hooks, had it run.

        Args:
            layer: number among the MoE layers.
            hidden_states: [T, H], what the norm made: the first rows of the program's.
        """
        norm, stream = self._residuals.get(layer, (None, None))
        if norm is not None and stream is not None:
            for hook in norm._forward_hooks.values():
                hook(norm, (stream[: len(hidden_states)],), hidden_states)

    def call(self, instruction: Instruction) -> None:
        """Run a "torch" instruction."""
        about = instruction.attributes

        def of(value: Any) -> Any:
            return self.tensor(value) if isinstance(value, Operand) else value

        args, kwargs = torch.utils._pytree.tree_map(of, (about["args"], about["kwargs"]))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        made = about["call"](*args, **kwargs)
        for operand, result in zip(
            instruction.outputs, made if isinstance(made, (tuple, list)) else [made], strict=True
        ):
            self.tensor(operand).copy_(result)

    def _words(self, instruction: Instruction) -> np.ndarray:
        about, kind = instruction.attributes, KINDS.index(instruction.kind)
        whole: list[int] = []
        real: list[float] = []
        first, *more = instruction.outputs
        operands = [first, *instruction.inputs, *more]
        if instruction.kind in ("torch", "own"):
            return instruction_words(_ELSEWHERE, [], [], [])
        if instruction.kind == "pointwise":
            side = {"right": 2, "left": 3}.get(about.get("side", ""), 1 if len(instruction.inputs) == 2 else 0)
            whole, real = [POINTWISE.index(about["op"]), side], [about.get("number", 0.0), about.get("factor", 1.0)]
            operands = coalesce(operands)
        elif instruction.kind == "linear":
            count = len(instruction.outputs)
            formats = _packed_formats(instruction)
            whole = [count, 3 if instruction.inputs[1].dtype in STORED and not formats else 1, formats]
        elif instruction.kind == "rows":
            whole = [_packed_formats(instruction)]
        elif instruction.kind in ("rms_norm", "add_norm"):
            real = [about["eps"]]
        elif instruction.kind == "experts":
            whole = [about["layer"]]
        elif instruction.kind == "attend":
            whole = [self._kept_places[about["layer"]], about["window"], about["chunk"]]
            real = [about["scale"], about["soft_cap"]]
        elif instruction.kind == "attend_latent":
            whole = [self._kept_places[about["layer"]], about["window"], about["chunk"]]
            real = [about["scale"]]
        elif instruction.kind == "reduce":
            whole = [REDUCTIONS.index(about["op"])]
        return instruction_words(kind, whole, real, [self._tensor_words(operand) for operand in operands])

    def _tensor_words(self, operand: Operand) -> list[int]:
        address = self._raw[operand.buffer].data_ptr() + operand.offset * operand.dtype.itemsize
        assert len(operand.sizes) <= MAX_DIMS, operand
        dtype = torch.bool if operand.dtype in STORED else operand.dtype  # bytes
        return tensor_words(address, DTYPES.index(dtype), operand.sizes, operand.strides)


def _packed_formats(instruction: Instruction) -> int:
    """Return the formats of matrices in blocks, a byte each; 0 where they are others."""
    numbers = [block_number(name) for name in instruction.attributes.get("formats", ())]
    return int.from_bytes(bytes(number or 0 for number in numbers), "little")


def coalesce(operands: list[Operand]) -> list[Operand]:
    """Merge neighbouring dimensions of tensors of one size where all go on without a gap; at least one stays."""
    sizes = operands[0].sizes
    dims: list[int] = [place for place, size in enumerate(sizes) if size != 1]
    merged: list[list[int]] = []
    for place in dims:
        if merged and all(one.strides[merged[-1][-1]] == one.strides[place] * sizes[place] for one in operands):
            merged[-1].append(place)
        else:
            merged.append([place])
    groups = merged or [[]]
    result = []
    for one in operands:
        strides = tuple(one.strides[group[-1]] if group else 1 for group in groups)
        shape = tuple(math.prod(sizes[place] for place in group) for group in groups)
        result.append(Operand(one.buffer, one.dtype, shape, strides, one.offset))
    return result


def plan_memory(program: Program) -> tuple[list[int | None], int]:
    """Place every buffer that a step makes.

    Args:
        program: buffers that are kept, constant or inputs get memory of their own.

    Returns:
        [buffers] offsets in bytes, None for weights; and the bytes of all.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, instruction in enumerate(program.body):
        for operand in (*instruction.outputs, *instruction.inputs):
            first.setdefault(operand.buffer, number)
            last[operand.buffer] = number
    if (hidden := program.last_hidden) is not None:
        last[hidden.buffer] = len(program.body)  # it is read behind the step
    offsets: list[int | None] = [None] * len(program.buffers)
    end = 0
    for number, buffer in enumerate(program.buffers):
        if buffer.kind in ("input", "constant", "kept"):
            offsets[number], end = end, end + align_up(buffer.num_bytes, _ALIGN_BYTES)
    placed: list[tuple[int, int, int, int]] = []  # offset, bytes, first and last instruction
    made = [number for number, buffer in enumerate(program.buffers) if buffer.kind == "made" and number in first]
    for number in sorted(made, key=lambda number: -program.buffers[number].num_bytes):
        size, offset = align_up(program.buffers[number].num_bytes, _ALIGN_BYTES), end
        meeting = [one for one in placed if one[2] <= last[number] and first[number] <= one[3]]
        candidates = [end, *(begin + length for begin, length, _, _ in meeting)]
        for candidate in sorted(candidates):
            if all(candidate + size <= begin or begin + length <= candidate for begin, length, _, _ in meeting):
                offset = candidate
                break
        placed.append((offset, size, first[number], last[number]))
        offsets[number] = offset
    return offsets, max([end, *(offset + size for offset, size, _, _ in placed)])
