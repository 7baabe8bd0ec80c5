"""Decode steps on a GPU that trust that no expert is missed, and the table by which kernels find experts themselves.

Knows slots and tensors. Knows nothing of routers, arithmetic or transformers. `offload/` and `moe/` import it.
"""
