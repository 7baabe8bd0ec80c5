"""Fewer instructions of a step: linears of one x, a sum and its norm, rotary embeddings; the same bits."""

import math
from collections import Counter
from dataclasses import replace

from moeflow.step.program import Instruction, Operand, Program

_LINEARS_AT_ONCE = 8  # as in _cpu.h
_MOST_FEATURES = 512  # of a rotated head: BLOCK in _step.cpp
_FIXED = ("weight", "literal", "constant")
_TWO = ("add", "mul")


def fuse(program: Program) -> Program:
    """Return a program of the same results in fewer instructions.

    Args:
        program: every tensor of it is written once.
    """
    for join in (_Body.with_rope, _Body.with_add_norm, _Body.with_joined_linears):
        program = join(_Body(program))
    return program


class _Body:
    """The body of a program, and who writes and reads each buffer."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._body = program.body
        self._writers: dict[int, list[int]] = {}
        self._reads: Counter[int] = Counter()
        for number, one in enumerate(program.body):
            for operand in one.outputs:
                self._writers.setdefault(operand.buffer, []).append(number)
            self._reads.update(operand.buffer for operand in one.inputs)

    # ---- Linears of one x ----

    def with_joined_linears(self) -> Program:
        """Join linears that read the same x, at the place of the first."""
        groups: dict[tuple, list[int]] = {}
        for number, one in enumerate(self._body):
            if one.kind == "linear" and len(one.outputs) == 1 and all(map(self._is_fixed, one.inputs[1:])):
                x, weight = one.inputs[:2]
                is_blocks = "formats" in one.attributes
                size = (x.dtype, math.prod(x.sizes), x.sizes[0])
                key = (x.buffer, x.offset, *size, weight.dtype, is_blocks, len(one.inputs))
                groups.setdefault(key, []).append(number)
        joined: dict[int, Instruction | None] = {}
        for numbers in groups.values():
            for begin in range(0, len(numbers), _LINEARS_AT_ONCE):
                together = numbers[begin : begin + _LINEARS_AT_ONCE]
                parts = [self._body[number] for number in together]
                joined.update(dict.fromkeys(together))
                columns = zip(*(part.inputs[1:] for part in parts), strict=True)
                inputs = (parts[0].inputs[0], *(operand for column in columns for operand in column))
                formats = [name for part in parts for name in part.attributes.get("formats", ())]
                about = {"formats": formats} if formats else {}
                joined[together[0]] = Instruction("linear", tuple(part.outputs[0] for part in parts), inputs, about)
        return self._with(joined)

    # ---- A sum and its norm ----

    def with_add_norm(self) -> Program:
        """Join each norm with the sum that it reads."""
        joined: dict[int, Instruction | None] = {}
        for number, one in enumerate(self._body):
            if one.kind != "rms_norm" or not self._is_fixed(one.inputs[1]):
                continue
            x, weight = one.inputs
            place = self._writer(x)
            if place is None or place in joined or not self._is_plain(place, "add"):
                continue
            made = self._body[place].outputs[0]
            tensors = (made, *self._body[place].inputs, *one.outputs)
            if all(t.is_contiguous and t.dtype == x.dtype and _count(t) == _count(x) for t in tensors) and (
                made.offset == x.offset
            ):
                a, b = self._body[place].inputs
                outputs = (made.view(x.sizes), one.outputs[0])
                inputs = (a.view(x.sizes), b.view(x.sizes), weight)
                joined[place] = Instruction("add_norm", outputs, inputs, one.attributes)
                joined[number] = None
        return self._with(joined)

    # ---- Rotary embeddings ----

    def with_rope(self) -> Program:
        """Join x * cos + cat(-second half, first half) * sin."""
        joined: dict[int, Instruction | None] = {}
        for number, one in enumerate(self._body):
            found = self._rope(one) if self._is_plain(number, "add") else None
            if found is not None:
                inputs, parts = found
                joined.update(dict.fromkeys(parts))
                joined[number] = Instruction("rope", one.outputs, inputs)
        return self._with(joined)

    def _rope(self, one: Instruction) -> tuple[tuple[Operand, ...], list[int]] | None:
        """Return x, cos and sin where an addition ends a rotation, and the instructions that lead to it."""
        first, second = (self._only_writer(operand, "mul") for operand in one.inputs)
        if first is None or second is None:
            return None
        x, cos = self._body[first].inputs
        turned, sin = self._body[second].inputs
        halves = self._writers.get(turned.buffer, [])
        if len(halves) != 2 or not all(self._is_plain(half, "copy") for half in halves):
            return None
        negated = self._only_writer(self._body[halves[0]].inputs[0], "neg")
        if negated is None or not self._is_private(turned, reads=1):
            return None
        out, size = one.outputs[0], x.sizes[-1]
        upper, lower = self._body[negated].inputs[0], self._body[halves[1]].inputs[0]
        expected = [_half(x, 1), _half(x, 0), _half(turned, 0), _half(turned, 1)]
        found = [upper, lower, self._body[halves[0]].outputs[0], self._body[halves[1]].outputs[0]]
        if size % 2 or size > _MOST_FEATURES or found != expected:
            return None
        if any(t.dtype != out.dtype or t.sizes != out.sizes for t in (x, cos, sin, turned)) or len(out.sizes) < 2:
            return None
        return (x, cos, sin), [first, second, *halves, negated]

    # ---- Of instructions ----

    def _with(self, joined: dict[int, Instruction | None]) -> Program:
        body = [joined.get(number, one) for number, one in enumerate(self._body)]
        return replace(self._program, body=[one for one in body if one is not None])

    def _is_fixed(self, operand: Operand) -> bool:
        return self._program.buffers[operand.buffer].kind in _FIXED

    def _is_private(self, operand: Operand, reads: int) -> bool:
        return self._program.buffers[operand.buffer].kind == "made" and self._reads[operand.buffer] == reads

    def _is_plain(self, number: int, op: str) -> bool:
        """Whether an instruction is an elementwise operation on tensors alone."""
        one = self._body[number]
        return one.kind == "pointwise" and one.attributes == {"op": op} and len(one.inputs) == (2 if op in _TWO else 1)

    def _writer(self, operand: Operand) -> int | None:
        """Return the one instruction that writes a buffer; None where there are several."""
        found = self._writers.get(operand.buffer, [])
        return found[0] if len(found) == 1 else None

    def _only_writer(self, operand: Operand, op: str) -> int | None:
        """Return the elementwise operation that makes just what one other reads."""
        number = self._writer(operand)
        if number is None or not self._is_plain(number, op) or not self._is_private(operand, reads=1):
            return None
        return number if self._body[number].outputs[0] == operand else None


def _count(operand: Operand) -> int:
    return math.prod(operand.sizes)


def _half(operand: Operand, which: int) -> Operand:
    """Return the first or the second half of the last dimension."""
    size = operand.sizes[-1] // 2
    offset = operand.offset + which * size * operand.strides[-1]
    return replace(operand, sizes=(*operand.sizes[:-1], size), offset=offset)
