"""Decode steps on a GPU that trust that no expert is missed, captured or not, and the table where kernels find experts.

Knows slots and tensors. Knows nothing of routers, arithmetic or transformers. `offload/`, `moe/` and `loading/` import
it.
"""
