"""Weight formats and how a matrix is brought into one: rounding, HQQ, GPTQ, packing, and back.

Know matrices. Know nothing of experts, files or models. `checkpoint/`, `hf/`, `moe/`, `step/`, `calibration/`,
`loading/`, `convert/`, `verify/` and the other files of `kernels/` import them.
"""
