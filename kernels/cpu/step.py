"""Step programs for the compiled library: instructions as 64-bit words, and what changes from step to step.

The structures are those of `_step.h`. Knows addresses, sizes and strides. Knows nothing of torch's tensors or models.
"""

import ctypes
from ctypes import c_int64, c_void_p

import numpy as np

from moeflow.errors import MoeflowError
from moeflow.kernels.cpu.library import loaded

MAX_DIMS = 6
_HEAD_WORDS = 10
_TENSOR_WORDS = 3 + 2 * MAX_DIMS
DONE = -1
_NO_MEMORY = -(2**63)


class StepIndexError(MoeflowError):
    """An index in a step is outside of its table."""


class StepLayer(ctypes.Structure):
    """Experts of one layer; the tables may be null, and then every call of it is the caller's."""

    _fields_ = [
        ("kernels", c_void_p),
        ("addresses", c_void_p),
        ("num_experts", c_int64),
        ("activation_bits", c_int64),
    ]


class StepState(ctypes.Structure):
    """Tables and counts of one step."""

    _fields_ = [
        ("layers", c_void_p),
        ("kept", c_void_p),
        ("lengths", c_void_p),
        ("firsts", c_void_p),
        ("num_rows", c_int64),
        ("num_live", c_int64),
        ("num_threads", c_int64),
        ("seconds", c_void_p),
        ("is_done", c_void_p),
        ("kept_format", c_int64),
    ]


def tensor_words(address: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Describe a tensor of at most `MAX_DIMS` dimensions."""
    padding = [0] * (MAX_DIMS - len(sizes))
    return [address, dtype, len(sizes), *sizes, *padding, *strides, *padding]


def instruction_words(kind: int, whole: list[int], real: list[float], tensors: list[list[int]]) -> np.ndarray:
    """Return an instruction as the library reads it, int64."""
    numbers = np.zeros(2, np.float64)
    numbers[: len(real)] = real
    head = [kind, len(tensors), *whole, *[0] * (6 - len(whole))]
    return np.concatenate([np.array(head, np.int64), numbers.view(np.int64), np.array(tensors, np.int64).reshape(-1)])


class StepCode:
    """Instructions in memory.

    Args:
        instructions: of `instruction_words`.
    """

    def __init__(self, instructions: list[np.ndarray]) -> None:
        self._words = instructions
        self._pointers = np.array([words.ctypes.data for words in instructions], np.int64)
        self._run = loaded().free.moeflow_step_run

    def __len__(self) -> int:
        return len(self._words)

    def replace(self, number: int, words: np.ndarray) -> None:
        """Put another instruction of the same size in the place of one."""
        self._words[number][:] = words

    def run(self, first: int, state: StepState) -> int:
        """Run from an instruction on.

        Returns:
            `DONE`, or the number of the instruction that the caller must run.

        Raises:
            StepIndexError: an index is outside of its table.
            MemoryError: no memory for what an instruction needs.
        """
        reached = self._run(self._pointers.ctypes.data, len(self), first, ctypes.addressof(state))
        if reached == _NO_MEMORY:
            raise MemoryError("no memory for an instruction of a step")
        if reached < DONE:
            raise StepIndexError(f"instruction {DONE - 1 - reached} of a step failed: an index is outside of its table")
        return reached
