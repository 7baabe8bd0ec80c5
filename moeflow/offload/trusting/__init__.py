"""Layers and decode steps on a GPU that are launched before the host knows their routes; what comes down afterwards.

Kernels find experts themselves, by a table. Knows slots and tensors. Knows nothing of routers, arithmetic or
transformers. `offload/` and `moe/` import it.
"""
