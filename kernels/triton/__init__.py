"""GPU kernels in Triton: decode, prefill, dequantisation, combine.

Know formats and activations. Know nothing of slots or streams. `moe/` and `doctor/` import them.
"""
