"""Plans where a step's tensors lie: buffers whose lives do not meet share memory."""

from moeflow.core import align_up
from moeflow.step.program import Program

_ALIGN_BYTES = 64


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
