"""The MoE layer as transformers calls it: dispatch, compute, combine.

Knows routes, experts in slots and kernels. Knows nothing of files or eviction. `step/`, `loading/`,
`expert_parallel/` and `verify/` import it.
"""
