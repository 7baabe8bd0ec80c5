"""CPU kernels: the compiled library, its argument structures, and the operations Python calls.

Know records' formats. Know nothing of caches or models. `machine/`, `checkpoint/`, `hf/`, `loading/`, `moe/`,
`step/`, `doctor/` and `cli/` import them.
"""
