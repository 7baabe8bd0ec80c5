"""The tiny kernel of `triton/probe.py`, apart since Triton may be absent."""

import triton
import triton.language as tl


@triton.jit
def add_one(number):
    """Add 1 to an int32."""
    tl.store(number, tl.load(number) + 1)
