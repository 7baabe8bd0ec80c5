"""Layers and decode steps on a GPU that are launched before the host knows their routes, captured or not.

And what comes down afterwards. Kernels find experts themselves, by a table. Knows slots and tensors. Knows nothing of
routers, arithmetic or transformers. `offload/`, `moe/` and `loading/` import it.
"""
