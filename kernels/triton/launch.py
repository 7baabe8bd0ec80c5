"""Launches of small kernels by what an earlier launch compiled: Triton's own way there takes longer than they do."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

# By kernel and key: the compiled kernel, and the values of its compile-time constants in the kernel's order.
_COMPILED: dict[tuple, tuple[Any, tuple]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    arguments: tuple,
    key: tuple[Hashable, ...],
    constants: Callable[[], dict[str, Any]],
    *,
    aligned: tuple[torch.Tensor, ...],
) -> None:
    """Launch a kernel, with four warps.

    Args:
        kernel: a function of Triton, whose compile-time constants come last.
        grid: programs.
        arguments: what is no compile-time constant, in the kernel's order; of all numbers, those that Triton may make
            a kernel of their own for are in `key`.
        key: all that a compiled kernel depends on, but for the card and the tensors' addresses.
        constants: returns the compile-time constants; asked where no kernel of this key was launched yet.
        aligned: tensors for whose addresses, at multiples of 16 or not, Triton makes kernels of their own.
    """
    device = aligned[0].device
    with torch.cuda.device_of(aligned[0]):
        is_aligned = not any(tensor.data_ptr() % 16 for tensor in aligned)
        place = (id(kernel), device, key)  # a kernel is a module's for good; Triton's own hash of it takes long
        found = _COMPILED.get(place) if is_aligned else None
        if found is not None:
            compiled, values = found
            compiled[grid[0], grid[1], 1](*arguments, *values)
            return
        named = constants()
        made = kernel[grid](*arguments, **named, num_warps=4, enable_fp_fusion=True)
        if is_aligned and hasattr(made, "packed_metadata"):  # compiled, and not interpreted
            order = kernel.arg_names[len(arguments) :]
            _COMPILED[place] = made, tuple(named[name] for name in order)
