"""Weight formats and how a matrix is brought into one: rounding, HQQ, GPTQ, packing, and back.

Know matrices. Know nothing of experts, files or models. `machine/`, `checkpoint/`, `hf/`, `moe/`, `step/`,
`calibration/`, `fit/`, `loading/`, `convert/`, `verify/`, `doctor/` and the other files of `kernels/` import them.
"""
